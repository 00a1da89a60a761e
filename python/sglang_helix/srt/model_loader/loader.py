"""Fitting a built model to a sharded cache, or refusing it. Extends `model_loader/loader.py`.

Models size their heads by tp_size. Under `--dcp-size K` every rank of a KVP group must hold the
same key-value heads, KV / A of them, or the group's ranks would keep tokens of different heads and
answer wrongly without an error; with replicated queries it holds the same H / A query heads too.

Where A >= KV, plain TP has it so already: rank r of N holds key-value head r // (N / KV), and so do
the K ranks beside it. Such a model stays as its class builds it, whatever stands in it beside its
projections, and only the adapter acts. The loader checks the heads of every attention layer, and
what reaches its softmax. Layers of a sliding window that have a pool of their own are plain TP's
in everything; those of others are cut by owner, if the model's windows are as its configuration
says.

Otherwise the projection is sharded by A while the model is built, the output projection stays
sharded by N, and afterwards every attention layer is told its new widths. A model whose layers
cannot be checked is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.runtime_context import get_parallel
from torch import nn

from sglang_helix.srt.configs.model_config import configured_window, sharded_heads
from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.attention.windows import windowed
from sglang_helix.srt.layers.dcp.planner import prepare_decode_context_parallel_metadata
from sglang_helix.srt.layers.linear import heads_shared_by, is_shared
from sglang_helix.srt.models.longcat_flash import share_identity_experts

# Upstream asks the model for its plan of an extend, by this name.
_PLAN = "prepare_context_parallel_metadata_for_dcp"
# Held by a layer that is attention and a Mamba mixer in one (Falcon-H1), for the mixer.
_NOT_OF_ATTENTION = ("mup_vector",)
# What classes call the sinks that they hand to attention, one for each of a rank's heads.
_SINKS = ("sinks", "attention_sink_bias")


class ModelRefusedError(ValueError):
    """The model would answer wrongly over a sharded cache; the message says why."""


class _Misfit(Exception):  # noqa: N818 what is wrong with a layer, not yet told to anybody
    """A layer and why it cannot be served; `as_built`: whether leaving it as it is would do."""

    def __init__(self, layer: str, reason: str, *, as_built: bool = False) -> None:
        super().__init__(f"{layer} has {reason}")
        self.as_built = as_built


def initialize_model(
    original: Callable[..., nn.Module], model_config: Any, *args: Any, **kwargs: Any
) -> nn.Module:
    """Build the model (upstream's `_initialize_model`) with its cache heads sharded by A.

    A draft model is as plain TP builds it: inside its scope there is no KVP group.

    Raises ModelRefusedError for a model that cannot be right.
    """
    parallel = get_parallel()
    if parallel.attn_dcp_size == 1:
        return original(model_config, *args, **kwargs)
    layout = Layout(parallel.attn_tp_size, parallel.attn_dcp_size)
    queries = bool(parallel.dcp_replicate_q_proj)
    heads, kv_heads = (
        sharded_heads(model_config),
        model_config.get_total_num_kv_heads(),
    )
    build = partial(original, model_config, *args, **kwargs)
    try:
        if model_config.attention_arch == AttentionArch.MLA:
            model = build()
            _check(model, model_config, layout.kvp_size)
            _check_mla(model, model_config)
            share_identity_experts(model, parallel.tp_size)
        elif layout.attn_tp_size >= kv_heads and not queries:
            model = build()
            windows = _check_windows(model, model_config, layout.tp_size)
            _check(model, model_config, layout.kvp_size, windows)
            _check_as_built(model, layout.tp_size, heads, kv_heads, windows)
        else:
            with heads_shared_by(layout.kvp_size, (heads, kv_heads), queries=queries):
                model = build()
            _check(model, model_config, layout.kvp_size)
            _fit(model, layout, heads, kv_heads, queries=queries)
    except _Misfit as misfit:
        architecture = " ".join(model_config.hf_config.architectures)
        raise ModelRefusedError(
            f"--dcp-size > 1 does not support {architecture}: {misfit}. "
            + _advice(layout, kv_heads, as_built=misfit.as_built)
        ) from None
    return model


def _advice(layout: Layout, kv_heads: int, *, as_built: bool) -> str:
    """What to do instead; also for a model that is served where its own heads stay as they are."""
    if get_parallel().attn_dp_size > 1:
        return (
            "Serve it without --attn-dp-size, for which its class of SGLang may not be made, or "
            "without --dcp-size."
        )
    widest, rest = divmod(layout.tp_size, kv_heads)
    if not as_built or rest or widest < 2:
        return "Serve it without --dcp-size."
    return (
        f"It is served with --dcp-size {widest} and no --attn-tp-size or --dcp-replicate-q-proj, "
        "or without --dcp-size."
    )


def _check_windows(model: nn.Module, model_config: Any, ranks: int) -> frozenset[str]:
    """Names of the window layers whose pool is whole; all others' is sharded.

    Refuses a layer whose window and whose pool are not of one kind, or whose heads are not those of
    its pool: it would be attended in a way in which it is not stored.
    """
    if not model_config.is_hybrid_swa:
        return frozenset()
    pooled, found = frozenset(model_config.swa_attention_layer_ids), set()
    kv_heads = model_config.get_swa_num_kv_heads(ranks)
    layers = _attention_layers(model)
    for name, layer in layers:
        if windowed(layer) != (layer.layer_id in pooled):
            raise _Misfit(name, "a window and no place among those, or a place and no window")
        if windowed(layer):
            found.add(name)
            _set_window(name, layer, configured_window(model_config))
            if layer.tp_k_head_num != kv_heads:
                raise _Misfit(
                    name, f"{layer.tp_k_head_num} key-value heads per rank, its pool {kv_heads}"
                )
    if len(found) == len(layers):
        raise _Misfit("the model", "windows in all of its layers: no cache grows with the context")
    return frozenset(found)


def _set_window(name: str, layer: RadixAttention, window: int | None) -> None:
    """Give a window layer exactly as many keys as its model was trained with, or refuse it.

    SGLang's layers are told how far back they see, W - 1. Some of its classes say W, and see a key
    more.
    """
    if window is None or layer.sliding_window_size + 1 not in (window, window + 1):
        raise _Misfit(name, f"a window that is not its configuration's {window}")
    layer.sliding_window_size = window - 1


def _fit_cut_windows(model: nn.Module, model_config: Any, kvp_size: int) -> None:
    """Check that windows without a pool of their own are there where the configuration has some.

    Some of SGLang's classes drop them, which shows where a context is longer.
    """
    layers, config, window = (
        _attention_layers(model),
        model_config.hf_text_config,
        configured_window(model_config),
    )
    kinds = getattr(config, "layer_types", None)
    asked = bool(window) and getattr(config, "use_sliding_window", True)
    any_windows = any(windowed(layer) for _, layer in layers)
    for name, layer in layers:
        if kinds and layer.layer_id < len(kinds):
            wanted = kinds[layer.layer_id] == "sliding_attention"
        else:  # transformers' classes without a list window every layer
            wanted = windowed(layer) if any_windows else asked
        if not windowed(layer):
            if wanted and not (window and window >= model_config.context_len):
                raise _Misfit(name, f"a window of {window} in its configuration alone")
            continue
        _set_window(name, layer, window if wanted else None)
        if (layer.sliding_window_size + 1) % kvp_size:
            raise _Misfit(name, f"a window of {window} keys, no multiple of {kvp_size}")


def _check(
    model: nn.Module, config: Any, kvp_size: int, windows: frozenset[str] = frozenset()
) -> None:
    """Refuse attention that no adapter computes over a sharded cache, or that cannot be seen.

    windows: names of the layers that may have a window in a pool of its own.
    """
    if not config.is_hybrid_swa:
        _fit_cut_windows(model, config, kvp_size)
    if not _attention_layers(model):
        # SGLang's wrapper of a transformers model, for one, keeps them out of the module tree.
        raise _Misfit("the model", "no attention layers of SGLang")
    caches: dict[int, str] = {}
    for name, layer in _attention_layers(model):
        # MLA's class has several layers of attention to one cache.
        owner = name.rpartition(".")[0]
        if caches.setdefault(layer.layer_id, owner) != owner:
            raise _Misfit(name, f"the cache of {caches[layer.layer_id]}")
        pooled = config.is_hybrid_swa and windowed(layer)
        reasons = {
            "a window in a pool of its own": pooled and name not in windows,
            "attention that is not a causal decoder's": layer.attn_type != AttentionType.DECODER,
            "cross attention": layer.is_cross_attention,
            "chunked local attention": layer.use_irope,
            # Its kernels take the number of keys they see for the position of the query.
            "temperature scaling by position": layer.xai_temperature_len > 0,
        }
        for reason, applies in reasons.items():
            if applies:
                raise _Misfit(name, reason)


def _check_mla(model: nn.Module, model_config: Any) -> None:
    """Refuse MLA other than DeepSeek's class: only there does upstream gather and exchange.

    Layers that keep a recurrent state in the place of a cache stay as plain TP has them (Ring-2.5).
    What plans an extend over a sharded prefix needs nothing of the model: where a class of model,
    or of a wrapper around one, has no such method, it is given the series'.
    """
    modules, states = dict(model.named_modules()), mambaish_config(model_config)
    for name, layer in _attention_layers(model):
        if states is not None and layer.layer_id not in states.full_attention_layer_ids:
            continue
        parent = modules[name.rpartition(".")[0]]
        if not hasattr(parent, "attn_mqa_for_dcp_decode"):
            raise _Misfit(name, "latent attention of a class of its own")
        if getattr(parent, "learnable_sink_param", None) is not None:
            raise _Misfit(name, "attention sinks")
        if getattr(parent, "use_dsa", False) and not hasattr(model, _PLAN):
            raise _Misfit(name, "sparse attention")
    if not hasattr(model, _PLAN):
        setattr(model, _PLAN, prepare_decode_context_parallel_metadata)


def _check_as_built(
    model: nn.Module, ranks: int, heads: int, kv_heads: int, windows: frozenset[str]
) -> None:
    """Check every sharded attention layer of a model that is served as plain TP builds it."""
    modules = dict(model.named_modules())
    own = (heads // ranks, 1)
    for name, layer in _attention_layers(model):
        if name in windows:
            continue
        parent = _owner(modules, name)
        _check_own_tensors(name, parent, sinks=own[0])
        children = dict(parent.named_children())
        projections = [c for c in children.values() if isinstance(c, QKVParallelLinear)]
        if any(child.startswith("index") for child in children):
            raise _Misfit(name, "an indexer of the keys that it sees")
        if hasattr(parent, "_fused_kv_store"):
            raise _Misfit(name, "a write to the cache that passes by the adapter")
        if not projections:
            raise _Misfit(name, "no QKVParallelLinear to tell its key-value heads by")
        for total in (projection.total_num_kv_heads for projection in projections):
            if total != kv_heads:
                raise _Misfit(name, f"{total} key-value heads, the model {kv_heads}")
        found = (layer.tp_q_head_num, layer.tp_k_head_num)
        if found != own:
            raise _Misfit(name, _heads_not(found, own))


def _fit(
    model: nn.Module, layout: Layout, total_heads: int, total_kv_heads: int, *, queries: bool
) -> None:
    """Tell every attention layer and its parent how many query and K/V heads it holds."""
    heads = total_heads // (layout.attn_tp_size if queries else layout.tp_size)
    kv_heads = layout.kv_heads(total_kv_heads)
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
            raise _Misfit(
                name,
                "attention that is not one QKVParallelLinear, RadixAttention and RowParallelLinear",
                as_built=bool(projections),
            )
        projection = projections[0]
        _check_own_tensors(name, parent)
        totals = (projection.total_num_heads, projection.total_num_kv_heads)
        # A class may bring groups like ours for a projection that holds a gate beside the queries.
        if projection not in shared or totals != (total_heads, total_kv_heads):
            raise _Misfit(
                name,
                f"{totals[0]} query and {totals[1]} key-value heads in its projection, other "
                "numbers than the model",
                as_built=totals[1] == total_kv_heads,
            )
        fitted.add(projection)
        found = (projection.num_heads, projection.num_kv_heads)
        if found != (heads, kv_heads):
            raise _Misfit(name, _heads_not(found, (heads, kv_heads)))
        if (layer.tp_q_head_num, layer.tp_k_head_num) == (heads, kv_heads):
            continue
        _check_beside_heads(name, layer, children, heads)
        for count, size, old, new in (
            ("num_heads", "q_size", layer.tp_q_head_num, heads),
            ("num_kv_heads", "kv_size", layer.tp_k_head_num, kv_heads),
        ):
            if (parent.__dict__.get(count), parent.__dict__.get(size)) != (
                old,
                old * layer.qk_head_dim,
            ):
                raise _Misfit(name, f"no {count} and {size} to set", as_built=True)
            setattr(parent, count, new)
            setattr(parent, size, new * layer.qk_head_dim)
        layer.tp_q_head_num = heads
        layer.tp_k_head_num = layer.tp_v_head_num = kv_heads
    for projection, name in shared.items():
        if projection not in fitted:
            raise _Misfit(name, "the heads of attention, but is no layer of it", as_built=True)


def _check_own_tensors(name: str, parent: nn.Module, sinks: int = 0) -> None:
    """Refuse attention with weights beside its projections, such as slopes.

    They reach the softmax, and no adapter is given them; but sinks, one for each of so many heads.
    """
    tensors = {**parent._parameters, **parent._buffers, **parent.__dict__}
    for own, value in tensors.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or own in _NOT_OF_ATTENTION:
            continue
        if own not in _SINKS:
            raise _Misfit(name, f"weights beside its projections ({own})")
        if value.shape != (sinks,):
            raise _Misfit(name, f"attention sinks {list(value.shape)}", as_built=not sinks)


def _check_beside_heads(name: str, layer: Any, children: dict[str, nn.Module], heads: int) -> None:
    """Refuse what depends on the number of heads in a way that `_fit` cannot follow."""
    for child_name, child in children.items():
        if isinstance(child, LinearBase | RadixAttention):
            continue
        weight = getattr(child, "weight", None)
        if weight is not None and tuple(weight.shape) != (layer.qk_head_dim,):
            raise _Misfit(name, f"a norm over several heads ({child_name})", as_built=True)
        if hasattr(child, "num_heads") or hasattr(child, "num_kv_heads"):
            raise _Misfit(name, f"a number of heads kept in {child_name}", as_built=True)
    if layer.tp_q_head_num == heads:
        return
    for child_name, child in children.items():
        # An output gate, say, which is as wide as N shards, not A.
        if isinstance(child, LinearBase) and not isinstance(
            child, QKVParallelLinear | RowParallelLinear
        ):
            raise _Misfit(name, f"a projection beside q, k, v and o ({child_name})", as_built=True)


def _owner(modules: dict[str, nn.Module], layer: str) -> nn.Module:
    """The module that projects a layer's queries; a class may keep several layers in a list."""
    parent = layer.rpartition(".")[0]
    while isinstance(modules[parent], nn.ModuleList):
        parent = parent.rpartition(".")[0]
    return modules[parent]


def _attention_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, RadixAttention)]


def _heads_not(found: tuple[int, int], wanted: tuple[int, int]) -> str:
    return (
        f"{found[0]} query and {found[1]} key-value heads per rank, not {wanted[0]} and {wanted[1]}"
    )
