"""Mamba2's state: prefill and decode."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sglang_cpu_reference.linear_attention.batch import check_known, served


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
    check_known(
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
    check_known({name: how[name] for name in known if name in how}, known)
    rows, slots = served(state_batch_indices)
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
