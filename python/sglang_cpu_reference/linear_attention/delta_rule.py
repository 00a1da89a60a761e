"""The gated delta rule: Gated DeltaNet's and Kimi Delta Attention's prefill and decode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sglang_cpu_reference.linear_attention.batch import check_known, requests, served

_CHUNK = 64  # tokens between the states that a prefill hands out, as the kernels have it


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Any:
    """The gated delta rule for one token of several requests: (outputs, states), both fp32.

    q, k [B, HV, K], v [B, HV, V], decay [B, HV, K] or [B, HV, 1] (factors), beta [B, HV],
    state [B, HV, V, K]. The state forgets, then takes what is new about the value at this key.
    """
    state = state * decay[:, :, None]
    known = (state * k[:, :, None]).sum(-1)
    state = state + (beta[..., None] * (v - known))[..., None] * k[:, :, None]
    return (state * q[:, :, None]).sum(-1), state


def gdn_gating(
    A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """Gates of Gated DeltaNet: log decay and beta, fp32 [1, T, HV], of a and b [T, HV]."""
    decay = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    **how: Any,
) -> tuple[Tensor, None, Tensor]:
    """Gated DeltaNet's prefill: q, k [1, T, H, K], v [1, T, HV, V], g and beta [1, T, HV].

    Returns outputs [1, T, HV, V], and the states at the start of every request's chunks
    [1, chunks, HV, V, K]; its last state is left in initial_state [slots, HV, V, K].
    """
    check_known(how, {"head_first": False, "use_qk_l2norm_in_kernel": True, "inplace_update": True})
    out, states = _prefill(
        q, k, v, g[0, ..., None], beta[0], initial_state, initial_state_indices, cu_seqlens
    )
    return out, None, states


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None = None,
    output_intermediate_states: bool = False,
    track_state: Tensor | None = None,
    track_chunk_idx: Tensor | None = None,
    **how: Any,
) -> Any:
    """Kimi Delta Attention's prefill: as Gated DeltaNet's, with a decay for each key element.

    g [1, T, H, K] and beta [1, T, H] come without their activations. track_state [B, H, V, K]
    takes each request's state at the start of its chunk track_chunk_idx [B], where that is not
    negative. Returns outputs, with output_intermediate_states (outputs, states at chunks).
    """
    chunks = {"chunk_indices": None, "chunk_offsets": None}
    check_known(how, {"use_qk_l2norm_in_kernel": True, "beta_is_raw": True, **chunks})
    decay = _kda_decay(A_log, g[0], dt_bias, lower_bound)
    out, states = _prefill(
        q, k, v, decay, beta[0].float().sigmoid(), initial_state, initial_state_indices, cu_seqlens
    )
    if track_state is not None and track_chunk_idx is not None:
        counts = -(-cu_seqlens.diff() // _CHUNK)
        rows = (track_chunk_idx >= 0).nonzero()[:, 0]
        track_state[rows] = states[0, (counts.cumsum(0) - counts + track_chunk_idx)[rows].long()]
    return (out, states) if output_intermediate_states else out


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The delta rule over every request's tokens; see `chunk_gated_delta_rule`.

    decay [T, HV, 1 or K] in log, beta [T, HV]; heads of queries and keys as they come.
    """
    scale, heads = k.shape[-1] ** -0.5, v.shape[2]
    queries, keys = _unit_heads(q[0], heads) * scale, _unit_heads(k[0], heads)
    out, chunks = torch.zeros_like(v), []
    for tokens, slot in requests(cu_seqlens, slots):
        state = pool[slot][None].float()
        for place, token in enumerate(range(tokens.start, tokens.stop)):
            if place % _CHUNK == 0:
                chunks.append(state)
            one = slice(token, token + 1)
            out[0, one], state = delta_rule(
                queries[one], keys[one], v[0, one].float(), decay[one].exp(), beta[one], state
            )
        pool[slot] = state[0].to(pool.dtype)
    return out, torch.cat(chunks)[None]


def _kda_decay(A_log: Tensor, a: Tensor, dt_bias: Tensor, lower_bound: float | None) -> Tensor:
    """The log decay of each key element, fp32, of a [T, H, K]."""
    rate = A_log.float().reshape(-1, 1).exp()
    a = a.float() + dt_bias.float().view(a.shape[1:])
    return (
        -rate * functional.softplus(a)
        if lower_bound is None
        else lower_bound * (rate * a).sigmoid()
    )


def gdn_packed_decode(
    mixed_qkv: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, **step: Any
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet's decode: a and b [B, HV]; see `_packed_decode`."""

    def gates(rows: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        decay, beta = gdn_gating(A_log, a[rows], b[rows], dt_bias)
        return decay[0, ..., None], beta[0]

    return _packed_decode(mixed_qkv, gates, **step)


def kda_packed_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None = None,
    **step: Any,
) -> tuple[Tensor, Tensor]:
    """Kimi Delta Attention's decode: a [B, H K], b [B, H], both without their activations."""

    def gates(rows: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        decay = _kda_decay(A_log, a[rows].view(q.shape), dt_bias, lower_bound)
        return decay, b[rows].float().sigmoid()

    return _packed_decode(mixed_qkv, gates, **step)


def _packed_decode(
    mixed_qkv: Tensor,
    gates: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    scale: float,
    initial_state: Tensor,
    out: Tensor,
    ssm_state_indices: Tensor,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """The delta rule for one token of each request: mixed_qkv [B, 2 H K + HV V], out [B, 1, HV, V].

    gates: the log decay [R, HV, 1 or K] and beta [R, HV] of the rows [R] that are served, and their
    queries [R, HV, K]. What has no state (padding) leaves zeros in its row of out.
    """
    check_known(how, {"use_qk_l2norm_in_kernel": True})
    rows, slots = served(ssm_state_indices)
    q, k, v = _packed(mixed_qkv[rows], initial_state)
    decay, beta = gates(rows, q)
    result, state = delta_rule(q * scale, k, v, decay.exp(), beta, initial_state[slots].float())
    out.zero_()
    out[rows, 0] = result.to(out.dtype)
    initial_state[slots] = state.to(initial_state.dtype)
    return out, initial_state


def _unit_heads(x: Tensor, heads: int) -> Tensor:
    """Heads of length 1, fp32, each as often as value heads share it: [., H, K] -> [., HV, K]."""
    x = x.float()
    x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _packed(mixed_qkv: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a decode batch, fp32, with as many heads as states have."""
    heads, value_width, width = states.shape[-3:]
    values = heads * value_width
    keys = (mixed_qkv.shape[1] - values) // 2
    q, k, v = mixed_qkv.split([keys, keys, values], dim=-1)
    q, k = (_unit_heads(part.unflatten(1, (-1, width)), heads) for part in (q, k))
    return q, k, v.float().unflatten(1, (heads, value_width))
