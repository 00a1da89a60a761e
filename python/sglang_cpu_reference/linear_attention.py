"""Recurrent states of hybrid models, upstream Triton kernels, in plain torch, token by token.

What stands in the place of a kernel takes its arguments and leaves behind what it leaves; a
request whose slot is negative is padding. States and sums are fp32, whatever comes in. Shapes:
T tokens of a batch, request after request as cu_seqlens says, or B requests with one token each;
H key heads of K elements, HV value heads of V elements, a multiple of H.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 64  # tokens between the states that a prefill hands out, as the kernels have it
_KERNELS = "sglang.kernels.ops"


def install() -> None:
    """Keep the convolutions' last inputs in fp32, as models are served here; upstream: bf16."""
    os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")


def install_in_rank() -> None:
    """Name the convolutions where SGLang imports them for the platforms that it knows alone."""
    from sglang.srt.layers.attention.mamba import mamba

    for suffix in ("", "_triton"):
        setattr(mamba, f"causal_conv1d_fn{suffix}", causal_conv1d_fn)
        setattr(mamba, f"causal_conv1d_update{suffix}", causal_conv1d_update)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor,
    has_initial_state: Tensor | None = None,
    activation: str | bool | None = "silu",
    **_: Any,
) -> Tensor:
    """The short convolution of a prefill: x [D, T], weight [D, W] -> [D, T].

    conv_states [slots, D, W - 1], read where has_initial_state [B] says so: a request's last
    inputs.
    """
    out = torch.zeros_like(x)
    for place, (tokens, slot) in enumerate(_requests(query_start_loc, cache_indices)):
        state = conv_states[slot]
        before = state if has_initial_state is None or has_initial_state[place] else 0 * state
        inputs = torch.cat([before.to(x.dtype), x[:, tokens]], dim=-1)
        sums = functional.conv1d(
            inputs[None], weight[:, None].to(x.dtype), bias, groups=len(weight)
        )[0]
        out[:, tokens] = _activated(sums, activation)
        state.copy_(inputs[:, -state.shape[-1] :])
    return out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    *,
    conv_state_indices: Tensor,
    pad_slot_id: int = -1,
    **drafts: Any,
) -> Tensor:
    """The short convolution of one token per request: x [B, D] -> [B, D]."""
    if x.dim() != 2 or any(value is not None for value in drafts.values()):
        raise NotImplementedError("the CPU reference convolves no draft tokens")
    out = torch.zeros_like(x)
    rows, slots = _served(conv_state_indices)
    inputs = torch.cat([conv_state[slots].to(x.dtype), x[rows, :, None]], dim=-1)
    sums = (inputs * weight.to(x.dtype)).sum(-1) + (0 if bias is None else bias)
    out[rows] = _activated(sums, activation)
    conv_state[slots] = inputs[..., 1:].to(conv_state.dtype)
    return out


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
    _check(how, {"head_first": False, "use_qk_l2norm_in_kernel": True, "inplace_update": True})
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
    _check(how, {"use_qk_l2norm_in_kernel": True, "beta_is_raw": True, **chunks})
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
    for tokens, slot in _requests(cu_seqlens, slots):
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
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    initial_state: Tensor,
    out: Tensor,
    ssm_state_indices: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet's decode: mixed_qkv [B, 2 H K + HV V], a and b [B, HV]; out [B, 1, HV, V]."""
    _check({"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}, {"use_qk_l2norm_in_kernel": True})
    rows, slots = _served(ssm_state_indices)
    q, k, v = _packed(mixed_qkv[rows], initial_state)
    decay, beta = gdn_gating(A_log, a[rows], b[rows], dt_bias)
    _step(q * scale, k, v, decay[0, ..., None].exp(), beta[0], initial_state, slots, out, rows)
    return out, initial_state


def kda_packed_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    initial_state: Tensor,
    out: Tensor,
    ssm_state_indices: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Kimi Delta Attention's decode: a [B, H K], b [B, H], both without their activations."""
    _check({"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}, {"use_qk_l2norm_in_kernel": True})
    rows, slots = _served(ssm_state_indices)
    q, k, v = _packed(mixed_qkv[rows], initial_state)
    decay = _kda_decay(A_log, a[rows].view(q.shape), dt_bias, lower_bound).exp()
    _step(q * scale, k, v, decay, b[rows].float().sigmoid(), initial_state, slots, out, rows)
    return out, initial_state


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    pool: Tensor,
    slots: Tensor,
    out: Tensor,
    rows: Tensor,
) -> None:
    """The delta rule for one token of each request served, into its row of out and its state."""
    result, state = delta_rule(q, k, v, decay, beta, pool[slots].float())
    out.zero_()
    out[rows, 0] = result.to(out.dtype)
    pool[slots] = state.to(pool.dtype)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    dt_bias: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    initial_states: Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    track_seq_idx: Tensor | None = None,
    track_end_locs: Tensor | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mamba2's prefill: x [1, T, H, P], dt [1, T, H], B and C [1, T, G, N]; out as x.

    initial_states [B, H, P, N], one for each request. Returns the states before every token
    whose place in the batch is a multiple of chunk_size [1, chunks, H, P, N], each request's last
    one [B, H, P, N], and those of the requests track_seq_idx before the tokens track_end_locs.
    """
    _check(
        {name: how[name] for name in ("z", "dt_softplus", "dt_limit", "return_track_states")},
        {"z": None, "dt_softplus": True, "dt_limit": (0.0, torch.inf), "return_track_states": True},
    )
    _, tokens, heads, width = x.shape
    bounds = cu_seqlens.tolist()
    wanted = [] if track_end_locs is None else track_end_locs.tolist()
    owners = [] if track_seq_idx is None else track_seq_idx.tolist()
    shape = (heads, width, B.shape[-1])
    dtype = state_dtype or x.dtype
    chunks = x.new_zeros(-(-tokens // chunk_size), *shape, dtype=dtype)
    tracked = x.new_zeros(len(wanted), *shape, dtype=dtype)
    last = x.new_zeros(len(bounds) - 1, *shape, dtype=dtype)
    for request, (start, stop) in enumerate(itertools.pairwise(bounds)):
        first = None if initial_states is None else initial_states[request, None].float()
        state = x.new_zeros(1, *shape, dtype=torch.float32) if first is None else first
        for token in range(start, stop + 1):
            for place, end in enumerate(wanted):
                if (end, owners[place]) == (token, request):
                    tracked[place] = state[0]
            if token == stop:
                break
            if token % chunk_size == 0:
                chunks[token // chunk_size] = state[0]
            one = slice(token, token + 1)
            out[0, one], state = ssd_step(
                x[0, one], dt[0, one], A, B[0, one], C[0, one], D, dt_bias, state
            )
        last[request] = state[0]
    return chunks[None], last, tracked[None] if wanted else None


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mamba2 for one token of several requests: outputs [B, H, P] and states [B, H, P, N], fp32.

    x [B, H, P], dt [B, H], A, D and dt_bias [H], B and C [B, G, N], G dividing H.
    """
    each = x.shape[1] // B.shape[1]
    B, C = (part.float().repeat_interleave(each, dim=1)[:, :, None] for part in (B, C))
    step = functional.softplus(dt.float() + dt_bias.float())
    decay = (step * A.float()).exp()
    x = x.float()
    state = state * decay[..., None, None] + (step[..., None] * x)[..., None] * B
    return (state * C).sum(-1) + D.float()[:, None] * x, state


def ssd_decode(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state_batch_indices: Tensor,
    out: Tensor,
    **how: Any,
) -> None:
    """Mamba2's decode: state [slots, H, P, N], x and out [B, H, P]; dt, A, D, dt_bias widened."""
    known = {"z": None, "dt_softplus": True, "disable_state_update": False}
    _check({name: how[name] for name in known if name in how}, known)
    rows, slots = _served(state_batch_indices)
    out.zero_()
    result, after = ssd_step(
        x[rows],
        dt[rows, :, 0],
        A[:, 0, 0],
        B[rows],
        C[rows],
        D[:, 0],
        dt_bias[:, 0],
        state[slots].float(),
    )
    out[rows], state[slots] = result.to(out.dtype), after.to(state.dtype)


def split_qkvz_ba(
    mixed_qkvz: Tensor,
    mixed_ba: Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Qwen3-Next's projections, which stand key head by key head: (qkv [T, .], z, b, a)."""
    tokens, each = len(mixed_qkvz), num_heads_v // num_heads_qk
    widths = [head_qk, head_qk, each * head_v, each * head_v]
    *qkv, z = mixed_qkvz.view(tokens, num_heads_qk, sum(widths)).split(widths, dim=-1)
    b, a = (part.reshape(tokens, -1) for part in mixed_ba.view(tokens, -1, 2, each).unbind(2))
    return torch.cat([p.flatten(1) for p in qkv], 1), z.reshape(tokens, -1, head_v), b, a


def split_whole_qkvz_ba(
    mixed_qkvz: Tensor,
    mixed_ba: Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Qwen3.5's projections, which stand one after the other: as `split_qkvz_ba` returns."""
    values = num_heads_v * head_v
    qkv, z = mixed_qkvz.split([2 * num_heads_qk * head_qk + values, values], dim=-1)
    b, a = mixed_ba.chunk(2, dim=-1)
    return qkv.contiguous(), z.reshape(-1, num_heads_v, head_v), b.contiguous(), a.contiguous()


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """x [., D], normalized over D, times the activated gate g of the same shape."""
    assert bias is None
    assert residual is None
    assert not prenorm
    gate = g.float().sigmoid()
    gate = gate if activation == "sigmoid" else g.float() * gate
    return (functional.rms_norm(x.float(), weight.shape, weight.float(), eps) * gate).to(x.dtype)


def grouped_rms_norm_gated(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    is_rms_norm: bool = False,
    activation: str = "swish",
    **how: Any,
) -> Tensor:
    """`rms_norm_gated` by groups, before or after the gate z: SGLang's own torch reference."""
    from sglang.kernels.ops.attention.fla.layernorm_gated import rms_norm_ref

    assert is_rms_norm
    assert activation in ("swish", "silu")
    return rms_norm_ref(x, weight, bias, None if z is None else z.reshape(x.shape), **how)


def track_states(
    conv_states: Tensor,
    ssm_states: Tensor,
    cache_indices: Tensor,
    mamba_track_mask: Tensor,
    mamba_track_indices: Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
    *,
    dim: int = 0,
) -> None:
    """Copy the states of the requests of the mask [B] to their track slots, along a dimension."""
    rows = mamba_track_mask[:batch_size] & (cache_indices[:batch_size] >= 0)
    source, target = (
        indices[:batch_size][rows].long() for indices in (cache_indices, mamba_track_indices)
    )
    for states in (conv_states, ssm_states):
        states.index_copy_(dim, target, states.index_select(dim, source))


def track_states_of_all_layers(*args: Any, **kwargs: Any) -> None:
    """`track_states` of pools [layers, slots, ...]."""
    track_states(*args, **kwargs, dim=1)


def _requests(cu_seqlens: Tensor, slots: Tensor) -> Iterator[tuple[slice, int]]:
    """Tokens and slot of every request that is not padding."""
    bounds = cu_seqlens.tolist()
    for (start, stop), slot in zip(itertools.pairwise(bounds), slots.tolist(), strict=True):
        if slot >= 0 and stop > start:
            yield slice(start, stop), slot


def _served(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a decode batch that are not padding, and their slots."""
    rows = (slots >= 0).nonzero()[:, 0]
    return rows, slots[rows].long()


def _activated(x: Tensor, activation: str | bool | None) -> Tensor:
    return functional.silu(x) if activation else x


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


def _check(how: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise NotImplementedError for arguments that would change what is computed."""
    if how != {name: value for name, value in known.items() if name in how}:
        raise NotImplementedError(f"the CPU reference computes {known} alone, not {how}")


REPLACED: dict[str, Callable[..., Any]] = {
    f"{_KERNELS}.mamba.causal_conv1d_triton.causal_conv1d_fn": causal_conv1d_fn,
    f"{_KERNELS}.mamba.causal_conv1d_triton.causal_conv1d_update": causal_conv1d_update,
    f"{_KERNELS}.mamba.mamba_state_scatter_triton.track_mamba_states_if_needed": track_states,
    f"{_KERNELS}.mamba.mamba_state_scatter_triton.track_mamba_states_all_layers": (
        track_states_of_all_layers
    ),
    f"{_KERNELS}.attention.linear.fused_gdn_gating.fused_gdn_gating": gdn_gating,
    f"{_KERNELS}.attention.fla.chunk.chunk_gated_delta_rule": chunk_gated_delta_rule,
    f"{_KERNELS}.attention.fla.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode": (
        gdn_packed_decode
    ),
    f"{_KERNELS}.attention.fla.fused_recurrent.fused_recurrent_kda_packed_decode": (
        kda_packed_decode
    ),
    f"{_KERNELS}.attention.fla.kda.chunk_kda": chunk_kda,
    f"{_KERNELS}.mamba.triton_ops.ssd_combined.mamba_chunk_scan_combined": ssd_scan,
    f"{_KERNELS}.mamba.triton_ops.mamba_ssm.selective_state_update": ssd_decode,
    f"{_KERNELS}.attention.fla.fused_norm_gate.rms_norm_gated": rms_norm_gated,
    f"{_KERNELS}.attention.fla.layernorm_gated.rms_norm_gated": grouped_rms_norm_gated,
    f"{_KERNELS}.attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat": split_qkvz_ba,
    f"{_KERNELS}.attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous": (
        split_whole_qkvz_ba
    ),
}
