"""Lightning attention (Ring-2.5): prefill and decode."""

import itertools
from typing import Any

import torch
from torch import Tensor

from sglang_cpu_reference.linear_attention.batch import check_known


def lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    decay_scales: Tensor,
    meta: Any,
    *,
    track_lens: Tensor | None = None,
    track_state_indices: Tensor | None = None,
    softmax_scale: float,
    **drafts: Any,
) -> Tensor:
    """`seg_la_fwd`: q, k and v [T, H, D] of requests, one token of each or many; out as v.

    A request's state [H, D, D] is left at its slot of s, and read there where meta.s_scales says
    that it has one; the state after its first track_lens tokens (0: none), at its slot of
    track_state_indices. decay_scales [H, 1, 1]: what a state loses with each token, in log.
    """
    check_known(drafts, {"caches": None, "cache_indices": None})
    out, left = torch.zeros_like(v), (-decay_scales).exp()
    bounds, slots, known = (
        part.tolist() for part in (meta.q_offsets, meta.s_offsets, meta.s_scales)
    )
    for request, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if (slot := slots[request]) < 0:
            continue
        state = s[slot].float() * bool(known[request])
        tracked = 0 if track_lens is None else int(track_lens[request])
        for token in range(start, stop):
            state = state * left + k[token].float()[..., None] * v[token].float()[:, None]
            out[token] = ((q[token].float() * softmax_scale)[:, None] @ state)[:, 0].to(out.dtype)
            if token + 1 - start == tracked and track_state_indices is not None:
                s[int(track_state_indices[request])] = state.to(s.dtype)
        s[slot] = state.to(s.dtype)
    return out
