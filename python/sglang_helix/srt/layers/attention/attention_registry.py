"""Which attention backends serve a sharded cache. Extends `layers/attention/attention_registry.py`.

Adapters take the place of upstream's factories under the same names, so that everything in SGLang
that goes by a backend's name keeps working.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

# Served under --dcp-size > 1; the first that fits the platform is the default.
GQA_BACKENDS = ("triton", "torch_native")
# FlashInfer-MLA, TRTLLM-MLA and CuteDSL-MLA are complete upstream and use the series' exchange.
MLA_BACKENDS = ("flashinfer", "trtllm_mla", "cutedsl_mla", "triton", "torch_native")


def create_triton_backend(runner: ModelRunner) -> Any:
    """Factory for `triton`."""
    from sglang_helix.srt.layers.attention.triton_backend import ShardedTritonAttnBackend

    return ShardedTritonAttnBackend(runner)


def create_torch_native_backend(runner: ModelRunner) -> Any:
    """Factory for `torch_native`: the plain torch reference, over a whole or a sharded cache.

    The CPU reference platform registers the same factory for every layout.
    """
    from sglang.srt.runtime_context import get_parallel

    from sglang_helix.srt.layers.attention import torch_native_backend

    if get_parallel().attn_dcp_size > 1:
        return torch_native_backend.ShardedTorchReferenceAttnBackend(runner)
    return torch_native_backend.TorchReferenceAttnBackend(runner)


def check_backend(backend: Any, *, mla: bool) -> None:
    """Raise SeriesError where a GQA or MHA model got a backend that is not an adapter.

    Another plugin may register a factory under the same name after the series did.
    """
    from sglang_helix.hook import SeriesError
    from sglang_helix.srt.layers.attention.sharded import ShardedAttention

    for part in (
        getattr(backend, "prefill_backend", backend),
        getattr(backend, "decode_backend", backend),
    ):
        adapted = isinstance(part, ShardedAttention)
        if not adapted and not (mla and type(part).__module__.startswith("sglang.srt.")):
            raise SeriesError(
                f"attention backend {type(part).__module__}.{type(part).__qualname__} does not "
                "serve a sharded cache: something replaced the adapter of sglang-helix"
            )


def absorbed_mla_backends() -> list[str]:
    """Adapters that take MLA's queries and keys in two parts and return (out, LSE)."""
    return ["triton", "torch_native"]
