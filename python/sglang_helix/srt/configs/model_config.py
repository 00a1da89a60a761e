"""What a model's configuration says of its layers. Extends `configs/model_config.py`."""

from __future__ import annotations

from typing import Any


def sharded_heads(model_config: Any) -> int:
    """Query heads, over all ranks, of the layers whose cache is sharded, the most of any.

    Layers of a window with a pool of its own may have another number, and keep it.
    """
    by_layer = getattr(model_config.hf_text_config, "num_attention_heads_per_layer", None)
    if by_layer and model_config.is_hybrid_swa:
        return max(by_layer[layer] for layer in model_config.full_attention_layer_ids)
    return int(model_config.get_max_num_attention_heads())


def state_heads(model_config: Any) -> list[int]:
    """Heads, and groups of them, that layers with recurrent states cut by tp size, as plain TP."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    config = mambaish_config(model_config)
    linear = getattr(config, "linear_attn_config", None) or {}
    names = (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "mamba_num_heads",
        "mamba_n_heads",
        "num_linear_key_value_heads",
        "group_norm_size",
    )
    counts = [linear.get("num_heads"), *(getattr(config, name, None) for name in names)]
    # Mamba2's groups; of one, every rank has a copy.
    groups = getattr(config, "n_groups", None) or getattr(config, "mamba_n_groups", None)
    counts.append(None if groups == 1 else groups)
    return [count for count in counts if count is not None]


def configured_window(model_config: Any) -> int | None:
    """Keys that a window layer sees, the query's own included; None where nothing says so."""
    config = model_config.hf_text_config
    for name in ("sliding_window", "sliding_window_size"):
        if (window := getattr(config, name, None)) is not None:
            return int(window)
    return None


def cut_window_of(model_config: Any) -> int:
    """Keys of the windows that share the pool of all layers, and are cut by owner; 0: none."""
    kinds = getattr(model_config.hf_text_config, "layer_types", None) or ()
    if model_config.is_hybrid_swa or "sliding_attention" not in kinds:
        return 0
    return configured_window(model_config) or 0
