"""MLA of DeepSeek's class over a sharded cache. Extends `models/deepseek_v2.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_helix.srt.layers.attention.attention_registry import absorbed_mla_backends
from sglang_helix.srt.models import value_projection


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
    """Scale queries by position before the core, where plain TP's branch would scale them in it.

    q_pe and q_nope_out [T, heads, .], llama_4_scaling [T, 1, 1] or None. Only for the names that
    the series appends: for those of upstream's own list plain TP takes the same branch as here.
    A chunk without a prefix is not absorbed, and upstream scales no query of it in any layout.

    Large batches of decode may project values first; see `value_projection`.
    """
    if llama_4_scaling is not None and layer.current_attention_backend in absorbed_mla_backends():
        q_pe = (q_pe * llama_4_scaling).to(q_pe.dtype)
        q_nope_out = (q_nope_out * llama_4_scaling).to(q_nope_out.dtype)
        llama_4_scaling = None
    attended = layer, q_pe, k_pe, q_nope_out, k_nope, forward_batch
    if value_projection.comes_first(layer, forward_batch, len(q_nope_out)):
        return value_projection.forward(*attended, llama_4_scaling, attention_output_gate)
    return original(
        *attended,
        *(zero_allocator, positions, topk_indices, llama_4_scaling),
        *(fusion_plan, attention_output_gate),
    )
