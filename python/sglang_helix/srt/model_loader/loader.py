"""Fitting a built model to a sharded cache, or refusing it. Extends `model_loader/loader.py`.

Models size their heads by tp_size. Under `--dcp-size K` every rank of a KVP group must hold the
same key-value heads, KV / A of them, or the group's ranks would keep tokens of different heads and
answer wrongly without an error; with replicated queries it holds the same H / A query heads too.
The projection is sharded so while the model is built, the output projection stays sharded by N, and
afterwards every attention layer is told its new widths. A model whose layers cannot be checked is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.runtime_context import get_parallel
from torch import nn

from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.linear import heads_shared_by, is_shared


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
        _check_mla(model, model_config)
        return model
    queries = bool(parallel.dcp_replicate_q_proj)
    heads, kv_heads = (
        model_config.get_max_num_attention_heads(),
        model_config.get_total_num_kv_heads(),
    )
    with heads_shared_by(layout.kvp_size, (heads, kv_heads), queries=queries):
        model = original(model_config, *args, **kwargs)
    _check(model, model_config)
    _fit(
        model,
        model_config,
        heads // (layout.attn_tp_size if queries else layout.tp_size),
        layout.kv_heads(kv_heads),
    )
    return model


def _check(model: nn.Module, model_config: Any) -> None:
    """Refuse attention that no adapter computes over a sharded cache, or that cannot be seen."""
    if not _attention_layers(model):
        # SGLang's wrapper of a transformers model, for one, keeps them out of the module tree.
        raise _refusal(model_config, "the model", "no attention layers of SGLang")
    for name, layer in _attention_layers(model):
        reasons = {
            "sliding-window attention": layer.sliding_window_size > -1,
            "attention that is not a causal decoder's": layer.attn_type != AttentionType.DECODER,
            "cross attention": layer.is_cross_attention,
            "chunked local attention": layer.use_irope,
            # Its kernels take the number of keys they see for the position of the query.
            "temperature scaling by position": layer.xai_temperature_len > 0,
        }
        for reason, applies in reasons.items():
            if applies:
                raise _refusal(model_config, name, reason)


def _check_mla(model: nn.Module, model_config: Any) -> None:
    """Refuse MLA other than DeepSeek's class: only there does upstream gather and exchange."""
    modules = dict(model.named_modules())
    for name, _ in _attention_layers(model):
        parent = modules[name.rpartition(".")[0]]
        if not hasattr(parent, "attn_mqa_for_dcp_decode"):
            raise _refusal(model_config, name, "latent attention of a class of its own")
    if not hasattr(model, "prepare_context_parallel_metadata_for_dcp"):
        raise _refusal(model_config, "the model", "no plan for a sharded prefix")


def _fit(model: nn.Module, model_config: Any, heads: int, kv_heads: int) -> None:
    """Tell every attention layer and its parent that it holds so many query and K/V heads."""
    modules = dict(model.named_modules())
    shared = {
        module: name
        for name, module in modules.items()
        if isinstance(module, QKVParallelLinear) and is_shared(module)
    }
    fitted = set()
    for name, layer in _attention_layers(model):
        parent = modules[name.rpartition(".")[0]]
        children = dict(parent.named_children())
        projections = [c for c in children.values() if isinstance(c, QKVParallelLinear)]
        outputs = [c for c in children.values() if isinstance(c, RowParallelLinear)]
        if len(projections) != 1 or len(outputs) != 1:
            raise _refusal(
                model_config,
                name,
                "attention that is not one QKVParallelLinear, RadixAttention and RowParallelLinear",
            )
        projection = projections[0]
        _check_own_tensors(model_config, name, parent)
        if projection not in shared:
            raise _refusal(
                model_config,
                name,
                f"{projection.total_num_heads} query and {projection.total_num_kv_heads} key-value "
                "heads, other numbers than the model",
            )
        fitted.add(projection)
        if (projection.num_heads, projection.num_kv_heads) != (heads, kv_heads):
            raise _refusal(
                model_config,
                name,
                f"{projection.num_heads} query and {projection.num_kv_heads} key-value "
                f"heads per rank, not {heads} and {kv_heads}",
            )
        if (layer.tp_q_head_num, layer.tp_k_head_num) == (heads, kv_heads):
            continue
        _check_beside_heads(model_config, name, layer, children, heads)
        for count, size, old, new in (
            ("num_heads", "q_size", layer.tp_q_head_num, heads),
            ("num_kv_heads", "kv_size", layer.tp_k_head_num, kv_heads),
        ):
            if (parent.__dict__.get(count), parent.__dict__.get(size)) != (
                old,
                old * layer.qk_head_dim,
            ):
                raise _refusal(model_config, name, f"no {count} and {size} to set")
            setattr(parent, count, new)
            setattr(parent, size, new * layer.qk_head_dim)
        layer.tp_q_head_num = heads
        layer.tp_k_head_num = layer.tp_v_head_num = kv_heads
    for projection, name in shared.items():
        if projection not in fitted:
            raise _refusal(model_config, name, "the heads of attention, but is no layer of it")


def _check_own_tensors(model_config: Any, name: str, parent: nn.Module) -> None:
    """Refuse attention with weights beside its projections, such as slopes or a sink per head.

    Its code takes their heads, and its position among them, from N; and no adapter is given them.
    """
    if getattr(parent, "sinks", None) is not None:
        raise _refusal(model_config, name, "attention sinks")
    tensors = {**parent._parameters, **parent._buffers, **parent.__dict__}
    for own, value in tensors.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            raise _refusal(model_config, name, f"weights beside its projections ({own})")


def _check_beside_heads(
    model_config: Any, name: str, layer: Any, children: dict[str, nn.Module], heads: int
) -> None:
    """Refuse what depends on the number of heads in a way that `_fit` cannot follow."""
    for child_name, child in children.items():
        if isinstance(child, LinearBase | RadixAttention):
            continue
        weight = getattr(child, "weight", None)
        if weight is not None and tuple(weight.shape) != (layer.qk_head_dim,):
            raise _refusal(model_config, name, f"a norm over several heads ({child_name})")
        if hasattr(child, "num_heads") or hasattr(child, "num_kv_heads"):
            raise _refusal(model_config, name, f"a number of heads kept in {child_name}")
    if layer.tp_q_head_num == heads:
        return
    for child_name, child in children.items():
        # An output gate, say, which is as wide as N shards, not A.
        if isinstance(child, LinearBase) and not isinstance(
            child, QKVParallelLinear | RowParallelLinear
        ):
            raise _refusal(model_config, name, f"a projection beside q, k, v and o ({child_name})")


def _attention_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, RadixAttention)]


def _refusal(model_config: Any, layer: str, reason: str) -> ModelRefusedError:
    architecture = " ".join(model_config.hf_config.architectures)
    return ModelRefusedError(
        f"--dcp-size > 1 does not support {architecture}: {layer} has {reason}. "
        "Serve it without --dcp-size."
    )
