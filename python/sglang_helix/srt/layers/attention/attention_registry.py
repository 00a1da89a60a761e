"""Factories of attention backends. Extends `layers/attention/attention_registry.py`.

Adapters take the place of upstream's backends under the same names, so that everything in SGLang
that goes by a backend's name keeps working. Which ones there are: `adapters.py`.
"""

from __future__ import annotations

import functools
import math
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_helix.srt.layers.attention.adapters import ADAPTERS, adapter, serving

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_helix.srt.layers.attention.adapters import Attention


def create_backend(name: str, original: Callable[[ModelRunner], Any], runner: ModelRunner) -> Any:
    """In the place of `original`, the factory of a backend: its adapter over a sharded cache.

    Raises ValueError where it does not read the cache that a checkpoint asked for, which start-up
    does not see.
    """
    import torch
    from sglang.srt.runtime_context import get_parallel, get_platform, get_spec

    if get_parallel().attn_dcp_size == 1:
        return original(runner)
    attention: Attention = "MLA" if runner.use_mla_backend else "GQA"
    record, cache = adapter(name), runner.kv_cache_dtype
    e5m2 = cache == torch.float8_e5m2
    if cache != runner.dtype and (reason := record.refuses_fp8(attention, e5m2=e5m2)):
        others = (
            one.name
            for one in serving(attention)
            if one.runs_on(get_platform(), attention) and not one.refuses_fp8(attention, e5m2=e5m2)
        )
        raise ValueError(
            f"--attention-backend {name} does not read a cache of {cache} for {attention} with "
            f"--dcp-size > 1 ({reason}), and this checkpoint asks for one: give --kv-cache-dtype "
            f"bfloat16, or --attention-backend {' or '.join(others)}."
        )
    drafts = get_spec().speculative_algorithm is not None
    own = record.own_class(attention, drafts=drafts)
    backend = pkgutil.resolve_name(own)(runner) if own else original(runner)
    if attention == "MLA":
        _check_scale(name, backend, runner)
    return backend


def _check_scale(name: str, backend: Any, runner: ModelRunner) -> None:
    """Raise ValueError where FlashInfer would attend with another softmax scale than the layers'.

    Its plans of MLA, which prefill for others too, take the scale from the configuration. Models
    without positions, such as Kimi-Linear, leave out the factor of a YaRN that stands there.
    """
    from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
    from sglang.srt.layers.radix_attention import RadixAttention

    if not isinstance(backend, FlashInferMLAAttnBackend):
        return
    planned, latent = runner.model_config.scaling, runner.model_config.kv_lora_rank
    for layer in runner.model.modules():
        # Plans are of layers over the latent: Ring-2.5 has others, which keep a recurrent state.
        if not isinstance(layer, RadixAttention) or layer.v_head_dim != latent:
            continue
        if not math.isclose(layer.scaling, planned):
            raise ValueError(
                f"--attention-backend {name} attends with a softmax scale of {planned:.6g}, which "
                f"SGLang takes from the configuration; layer {layer.layer_id} of this model has "
                f"{layer.scaling:.6g}. Give --attention-backend triton, or remove the factor of "
                "rope_scaling that the model does not use from config.json."
            )


def create_torch_native_backend(runner: ModelRunner) -> Any:
    """`torch_native` of the CPU reference platform: plain torch, with MLA, over either cache."""
    from sglang_helix.srt.layers.attention.torch_reference import TorchReferenceAttnBackend

    return create_backend("torch_native", TorchReferenceAttnBackend, runner)


def check_backend(backend: Any, *, mla: bool) -> None:
    """Raise SeriesError where a model got a backend that `ADAPTERS` does not name for it.

    Another plugin may register a factory under the same name after the series did.
    """
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend

    from sglang_helix.helix import SeriesError

    if isinstance(backend, HybridLinearAttnBackend):  # the others keep recurrent states
        backend = backend.full_attn_backend

    attention: Attention = "MLA" if mla else "GQA"
    known = {name for record in serving(attention) for name in record.classes(attention)}
    # FlashInfer's has attributes of the same names, of other things.
    halves = isinstance(backend, HybridAttnBackend)
    for part in (backend.prefill_backend, backend.decode_backend) if halves else (backend,):
        found = f"{type(part).__module__}:{type(part).__qualname__}"
        if found not in known:
            raise SeriesError(
                f"attention backend {found.replace(':', '.')} does not serve a sharded cache: "
                "something replaced the adapter of sglang-helix"
            )


@functools.cache
def absorbed_mla_backends() -> tuple[str, ...]:
    """Adapters that take MLA's queries and keys in two parts and return (out, LSE).

    Without those that SGLang's list has itself; the same names after the series extended it.
    """
    from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS

    return tuple(
        record.name
        for record in ADAPTERS
        if record.own_class("MLA") and record.name not in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
    )
