"""MLA of DeepSeek's class over a sharded cache. Extends `models/deepseek_v2.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_helix.srt.models import value_projection


def forward_prepare(
    original: Callable[..., Any],
    layer: Any,
    positions: Any,
    hidden_states: Any,
    forward_batch: Any,
    zero_allocator: Any,
    input_on_attn_tp_slices: bool = False,
    llama_4_scaling: Any = None,
    prev_topk_indices: Any = None,
) -> Any:
    """Scale the queries of a chunk that is not absorbed by position: upstream scales none of them.

    llama_4_scaling [T, 1, 1] or None; its queries [T, heads, .].
    """
    prepared = original(
        layer,
        *(positions, hidden_states, forward_batch, zero_allocator, input_on_attn_tp_slices),
        *(llama_4_scaling, prev_topk_indices),
    )
    if llama_4_scaling is None or not isinstance(prepared, tuple):
        return prepared
    hidden, method, batch, state = prepared
    if state is None or not method.name.startswith("MHA"):
        return prepared
    return hidden, method, batch, (_scaled(state[0], llama_4_scaling), *state[1:])


def _scaled(queries: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """Queries by their scaling, of their own dtype and within its range."""
    most = torch.finfo(queries.dtype).max
    return (queries * scaling.to(torch.float32)).clamp(-most, most).to(queries.dtype)


def forward_absorb_core(
    original: Callable[..., Any],
    layer: Any,
    q_pe: Any,
    k_pe: Any,
    q_nope_out: Any,
    k_nope: Any,
    forward_batch: Any,
    zero_allocator: Any,
    positions: Any,
    topk_indices: Any,
    llama_4_scaling: Any,
    fusion_plan: Any = None,
    attention_output_gate: Any = None,
) -> Any:
    """Scale queries by position before the core, which leaves it to the backends: few do it.

    q_pe and q_nope_out [T, heads, .], llama_4_scaling [T, 1, 1] or None.

    Large batches of decode may project values first; see `value_projection`.
    """
    if llama_4_scaling is not None:
        q_pe, q_nope_out = _scaled(q_pe, llama_4_scaling), _scaled(q_nope_out, llama_4_scaling)
    attended = layer, q_pe, k_pe, q_nope_out, k_nope, forward_batch
    if value_projection.comes_first(layer, forward_batch, len(q_nope_out)):
        return value_projection.forward(*attended, attention_output_gate)
    return original(
        *attended,
        *(zero_allocator, positions, topk_indices),
        *(None, fusion_plan, attention_output_gate),  # no scaling: it is in the queries
    )
