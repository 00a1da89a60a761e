"""Fitting a built model to a sharded cache, or refusing it. Extends `model_loader/loader.py`.

Models size their key-value heads by tp_size. Under `--dcp-size K` every rank of a KVP group must
hold the same key-value heads, KV / A of them, or the group's ranks would keep tokens of different
heads and answer wrongly without an error. The projection is sharded so while the model is built;
afterwards every attention layer is told its new width. A model whose layers cannot be checked is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.runtime_context import get_parallel
from torch import nn

from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.linear import kv_heads_shared_by


class ModelRefusedError(ValueError):
    """The model would answer wrongly over a sharded cache; the message says why."""


def initialize_model(
    original: Callable[..., nn.Module], model_config: Any, *args: Any, **kwargs: Any
) -> nn.Module:
    """Build the model (upstream's `_initialize_model`) with its cache heads sharded by A."""
    parallel = get_parallel()
    layout = Layout(parallel.tp_size, parallel.attn_dcp_size)
    if model_config.attention_arch == AttentionArch.MLA:
        model = original(model_config, *args, **kwargs)
        _check(model, model_config)
        return model
    with kv_heads_shared_by(layout.kvp_size):
        model = original(model_config, *args, **kwargs)
    _check(model, model_config)
    _fit(model, model_config, layout.kv_heads(model_config.get_total_num_kv_heads()))
    return model


def _check(model: nn.Module, model_config: Any) -> None:
    """Refuse attention that no adapter computes over a sharded cache."""
    for name, layer in _attention_layers(model):
        reasons = {
            "sliding-window attention": layer.sliding_window_size > -1,
            "attention that is not a causal decoder's": layer.attn_type != AttentionType.DECODER,
            "cross attention": layer.is_cross_attention,
            "chunked local attention": layer.use_irope,
        }
        for reason, applies in reasons.items():
            if applies:
                raise _refusal(model_config, name, reason)


def _fit(model: nn.Module, model_config: Any, kv_heads: int) -> None:
    """Tell every attention layer and its parent that it holds `kv_heads` key-value heads."""
    parents = dict(model.named_modules())
    for name, layer in _attention_layers(model):
        parent = parents[name.rpartition(".")[0]]
        children = dict(parent.named_children())
        projections = [c for c in children.values() if isinstance(c, QKVParallelLinear)]
        outputs = [c for c in children.values() if isinstance(c, RowParallelLinear)]
        if len(projections) != 1 or len(outputs) != 1:
            raise _refusal(
                model_config,
                name,
                "attention that is not one QKVParallelLinear, RadixAttention and RowParallelLinear",
            )
        if getattr(parent, "sinks", None) is not None:
            raise _refusal(model_config, name, "attention sinks")
        if projections[0].num_kv_heads != kv_heads:
            raise _refusal(
                model_config, name, f"{projections[0].num_kv_heads} key-value heads per rank"
            )
        if layer.tp_k_head_num == kv_heads:
            continue
        key_norms = [children[n] for n in ("k_norm", "k_layernorm") if n in children]
        if any(tuple(norm.weight.shape) != (layer.qk_head_dim,) for norm in key_norms):
            raise _refusal(model_config, name, "a key norm over several heads")
        if (parent.__dict__.get("num_kv_heads"), parent.__dict__.get("kv_size")) != (
            layer.tp_k_head_num,
            layer.tp_k_head_num * layer.qk_head_dim,
        ):
            raise _refusal(model_config, name, "no num_kv_heads and kv_size to set")
        parent.num_kv_heads = kv_heads
        parent.kv_size = kv_heads * layer.qk_head_dim
        layer.tp_k_head_num = layer.tp_v_head_num = kv_heads


def _attention_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, RadixAttention)]


def _refusal(model_config: Any, layer: str, reason: str) -> ModelRefusedError:
    architecture = " ".join(model_config.hf_config.architectures)
    return ModelRefusedError(
        f"--dcp-size > 1 does not support {architecture}: {layer} has {reason}. "
        "Serve it without --dcp-size."
    )
