"""Every legal layout of a model: heads, cache capacity, collectives and bytes per layer.

``python -m sglang_helix layout --model-path DIR --tp 8``. Heads and cache rows come from SGLang's
own ModelConfig, which sizes the pool of a server. Nothing is loaded, no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sglang_helix.srt.configs.model_config import sharded_heads
from sglang_helix.srt.distributed.topology import Layout, legal_layouts

# Bytes of an element of the cache, and of an output on the wire (bf16).
CACHE_BYTES = {"bf16": 2, "fp8": 1, "fp32": 4}
_WIRE_BYTES = 2
_LSE_BYTES = 4
_FP32_BYTES = 4


class Shape(NamedTuple):
    """What of a model decides its layouts; widths in elements."""

    query_heads: int
    kv_heads: int | None  # None: MLA, one latent for all heads
    query_width: int
    output_width: int
    row_width: int  # of one cached head, K and V, or of the latent
    layers: int  # that keep a cache of the whole context


class Row(NamedTuple):
    """One layout of a model."""

    layout: Layout
    query_heads: int  # attended by a rank, over its tokens
    own_heads: int  # of the result that a rank ends with
    kv_heads: int  # cached by a rank
    kv_bytes: int  # per cached token of a rank, all layers, and K tokens of a draft model
    kv_tokens: int  # of the whole KVP group, in the given memory of each rank
    ratio: float  # kv_tokens over plain TP's
    collectives: dict[str, int]  # per layer and decode step, with the output all-reduce
    wire_bytes: dict[str, int]  # sent per rank, layer and decoded token, without that all-reduce


def shape_of(model_config: Any) -> Shape:
    """The shape of a model from SGLang's ModelConfig."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    heads, layers = sharded_heads(model_config), model_config.num_hidden_layers
    if (hybrid := mambaish_config(model_config)) is not None:
        layers = len(hybrid.full_attention_layer_ids)
    layers -= window_layers(model_config)
    if model_config.attention_arch == AttentionArch.MLA:
        latent = model_config.kv_lora_rank
        row = latent + model_config.qk_rope_head_dim
        return Shape(heads, None, row, latent, row, layers)
    key, value = model_config.head_dim, model_config.v_head_dim
    kv_heads = model_config.get_total_num_kv_heads()
    return Shape(heads, kv_heads, key, value, key + value, layers)


def window_layers(model_config: Any) -> int:
    """How many layers keep a window of the context, in a pool of their own."""
    return len(model_config.swa_attention_layer_ids or ()) if model_config.is_hybrid_swa else 0


def draft_shape_of(model_path: str) -> Shape:
    """The shape of a draft: a model, or the layers that a model brings to draft with (MTP)."""
    from sglang.srt.configs.model_config import ModelConfig

    config = ModelConfig(model_path, is_draft_model=True)
    layers = getattr(config, "num_nextn_predict_layers", None) or config.num_hidden_layers
    return shape_of(config)._replace(layers=layers)


def state_bytes(model_config: Any, tp_size: int) -> int | None:
    """What one recurrent state takes on each of N ranks; None for a model without any."""
    states = recurrent_states(model_config, tp_size)
    return None if states is None else int(states.mamba_cache_per_req)


def recurrent_states(model_config: Any, tp_size: int) -> Any | None:
    """SGLang's account of the recurrent states of a hybrid, as each of N ranks keeps them."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.runtime_context import get_parallel

    if (hybrid := mambaish_config(model_config)) is None:
        return None
    widths = {"tp_size": tp_size, "attn_tp_size": tp_size, "enable_cp_tp_group_sharing": False}
    with get_parallel().override(**widths):
        return hybrid.mamba2_cache_params


def states(shape: Shape, tp_size: int, state: int, cache_dtype: str) -> str:
    """In a sentence: the recurrent states of a hybrid model beside its cache."""
    listed = rows(shape, tp_size, 2.0**40, CACHE_BYTES[cache_dtype])
    best = max(listed, key=lambda row: row.ratio)
    tokens = state * best.layout.kvp_size // best.kv_bytes
    return (
        f"Recurrent states: {state / 2**20:.1f} MiB a rank for each request that runs and each "
        f"cached prefix, in every layout, as much as {tokens:,} KV tokens with --dcp-size "
        f"{best.layout.kvp_size}. `--mamba-full-memory-ratio` divides the memory between them "
        "and the cache, 0.9 to 1 by default."
    )


def rows(
    shape: Shape, tp_size: int, memory: float, cache_bytes: int, draft: Shape | None = None
) -> Iterator[Row]:
    """Every legal layout of N = tp_size ranks; `memory`: bytes of each rank for the cache.

    draft: a draft model's, whose cache every rank has whole, for its share of plain TP's heads.
    """
    plain = Layout(tp_size, 1)
    drafted = 0 if draft is None else _kv_bytes(draft, plain, cache_bytes)
    in_plain_tp = _kv_bytes(shape, plain, cache_bytes) + drafted
    for layout in legal_layouts(tp_size, shape.query_heads, shape.kv_heads or 1):
        kv_bytes = _kv_bytes(shape, layout, cache_bytes) + drafted * layout.kvp_size
        yield Row(
            layout,
            query_heads=shape.query_heads // layout.attn_tp_size,
            own_heads=shape.query_heads // tp_size,
            kv_heads=_held(shape, layout),
            kv_bytes=kv_bytes,
            kv_tokens=tokens_in(memory, layout, kv_bytes),
            ratio=in_plain_tp * layout.kvp_size / kv_bytes,
            collectives=_collectives(layout),
            wire_bytes=wire_bytes(shape, layout),
        )


def values_bytes(shape: Shape, value: int, layout: Layout, element: float) -> float:
    """What --dcp-replicate-v-proj takes of each rank: latent to `value`, of the group's heads."""
    heads = shape.query_heads // layout.attn_tp_size
    return heads * shape.output_width * value * element * shape.layers


def values_first(model_config: Any, tp_size: int) -> str:
    """In a sentence: what --dcp-replicate-v-proj takes and saves; empty for what is not MLA."""
    from sglang_helix.srt.models.value_switch import switch

    shape, value = shape_of(model_config), model_config.v_head_dim
    if shape.kv_heads is not None:
        return ""
    element, cells = model_config.dtype.itemsize, []
    narrow = shape._replace(output_width=value)
    for layout in legal_layouts(tp_size, shape.query_heads, 1):
        if layout.kvp_size > 1:
            held = values_bytes(shape, value, layout, element) / 2**30
            sent = [wire_bytes(of, layout)["a2a+q"] / 1024 for of in (shape, narrow)]
            cells.append(
                f"{held:.2f} GiB a rank at `--dcp-size {layout.kvp_size}`, {sent[1]:.1f} KiB in "
                f"place of {sent[0]:.1f} behind attention"
            )
    return (
        f"`--dcp-replicate-v-proj`, which projects values before the exchange in batches of "
        f"{switch()}: {'; '.join(cells)}."
        if cells
        else ""
    )


def beside_a_draft(shape: Shape, draft: Shape, tp_size: int, cache_dtype: str) -> str:
    """In a sentence: what a draft model's whole cache takes, and what it leaves of the gain."""
    element = CACHE_BYTES[cache_dtype]
    cells = [
        f"{drafted.ratio:.2f}x at `--dcp-size {row.layout.kvp_size}` "
        f"(+{drafted.kv_bytes / row.kv_bytes - 1:.1%} memory)"
        for row, drafted in zip(
            rows(shape, tp_size, 0, element), rows(shape, tp_size, 0, element, draft), strict=True
        )
        if row.layout.kvp_size > 1
    ]
    layers = "one draft layer" if draft.layers == 1 else f"{draft.layers} draft layers"
    return f"With {layers}, whole on every rank, beside plain TP: {', '.join(cells)}."


def tokens_in(memory: float, layout: Layout, kv_bytes: int) -> int:
    """Tokens of a KVP group whose ranks have so many bytes each, `kv_bytes` for one of theirs."""
    return int(memory // kv_bytes) * layout.kvp_size


def _kv_bytes(shape: Shape, layout: Layout, cache_bytes: int) -> int:
    """Of a cached token of a rank, all layers."""
    return _held(shape, layout) * shape.row_width * shape.layers * cache_bytes


def _held(shape: Shape, layout: Layout) -> int:
    """Heads that a rank caches: key-value heads, or MLA's one latent."""
    return 1 if shape.kv_heads is None else layout.kv_heads(shape.kv_heads)


def _collectives(layout: Layout) -> dict[str, int]:
    """Collectives per layer: the output projection's all-reduce and what attention adds."""
    reduce = int(layout.tp_size > 1)
    if layout.kvp_size == 1:
        return dict.fromkeys(("a2a", "a2a+q", "ag_rs", "ag_rs+q"), reduce)
    # "+q": queries projected by every rank, not gathered. symm's one kernel stands for a2a's
    # collective, and sends the same rows but for the padding of their LSEs.
    return {"a2a": reduce + 2, "a2a+q": reduce + 1, "ag_rs": reduce + 3, "ag_rs+q": reduce + 2}


def wire_bytes(shape: Shape, layout: Layout) -> dict[str, int]:
    """Bytes a rank sends to its KVP group for one decoded token in one layer, as `Row` has them."""
    from torch import bfloat16

    from sglang_helix.srt.layers.dcp.packed_rows import packed_row_bytes

    peers = layout.kvp_size - 1
    own = shape.query_heads // layout.tp_size
    gather = own * shape.query_width * _WIRE_BYTES * peers
    a2a = own * packed_row_bytes(shape.output_width, bfloat16) * peers
    lses = shape.query_heads // layout.attn_tp_size * _LSE_BYTES * peers
    ag_rs = lses + own * shape.output_width * _FP32_BYTES * peers
    return {"a2a": gather + a2a, "a2a+q": a2a, "ag_rs": gather + ag_rs, "ag_rs+q": ag_rs}


def table(
    shape: Shape, tp_size: int, memory_gib: float, cache_dtype: str, draft: Shape | None = None
) -> str:
    """The layouts as a Markdown table; with the cache of a draft model, if one is given."""
    lines = [
        "| --attn-tp-size | --dcp-size | query heads: attended, own | K/V heads | KV KiB per token "
        f"and rank | KV tokens in {memory_gib:g} GiB a rank | beside plain TP | collectives per "
        "layer: a2a or symm, ag_rs (queries gathered / replicated) | KiB sent per rank, layer and "
        "token: a2a or symm, ag_rs (gathered / replicated) |",
        "|" + "---|" * 9,
    ]
    for row in rows(shape, tp_size, memory_gib * 2**30, CACHE_BYTES[cache_dtype], draft):
        calls, sent = row.collectives, {k: v / 1024 for k, v in row.wire_bytes.items()}
        kv_heads = "latent" if shape.kv_heads is None else str(row.kv_heads)
        lines.append(
            f"| {row.layout.attn_tp_size} | {row.layout.kvp_size} "
            f"| {row.query_heads}, {row.own_heads} | {kv_heads} | {row.kv_bytes / 1024:.1f} "
            f"| {row.kv_tokens:,} | {row.ratio:g}x "
            f"| {calls['a2a']} / {calls['a2a+q']}, {calls['ag_rs']} / {calls['ag_rs+q']} "
            f"| {sent['a2a']:.1f} / {sent['a2a+q']:.1f}, "
            f"{sent['ag_rs']:.1f} / {sent['ag_rs+q']:.1f} |"
        )
    return "\n".join(lines)
