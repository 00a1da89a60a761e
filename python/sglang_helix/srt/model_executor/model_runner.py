"""What a rank prepares between its model and its pool. Extends `model_executor/model_runner.py`.

Replicated query projection of MLA: see `replicas`.

Partial results of the Triton adapter's decode: upstream allocates them when the pool has taken its
share.

Symmetric memory of the `symm` exchange: as soon as the model is there, its heads, widths and dtype
are known; every rank is at this point at the same time; and the pool is sized by what is left.

A draft model needs none of it: inside its scope there is no KVP group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import (
    attention_backends,
    get_device,
    get_exec,
    get_parallel,
    get_schedule,
    get_spec,
)

from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.attention.sharded import windowed
from sglang_helix.srt.layers.dcp.exchange import BACKENDS, note_layer
from sglang_helix.srt.model_executor.replicas import asked_for, replicate_q_proj


def load_model(result: None, runner: Any) -> None:
    """After the weights are loaded and before the pool is sized: gather the replicas."""
    parallel = get_parallel()
    if parallel.dcp_replicate_q_proj and runner.use_mla_backend:
        replicate_q_proj(runner.model, required=asked_for(runner.server_args))


def prepare_decode(result: None, runner: Any) -> None:
    """After the weights are loaded and before the pool is sized: what Triton's decode needs."""
    if get_parallel().attn_dcp_size > 1 and "triton" in attention_backends():
        from sglang_helix.srt.layers.attention.triton_backend import prepare

        decode = get_exec().graph.cuda_graph_config.decode
        captured = 0 if decode.backend == "disabled" else max(decode.bs or [], default=0)
        runner.decode_scratch = prepare(runner, captured, _most_requests() or 1)


def prepare_exchange(result: None, runner: Any) -> None:
    """After the weights are loaded and before the pool is sized: what the exchange needs."""
    parallel, config = get_parallel(), runner.model_config
    backend = BACKENDS.get(parallel.dcp_comm_backend)
    if backend is None or backend.prepare is None or parallel.attn_dcp_size == 1:
        return
    layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
    for layer in layers:
        layer.register_forward_pre_hook(note_layer)
    layout = Layout(parallel.tp_size, parallel.attn_dcp_size)
    requests, drafts = _most_requests(), get_spec().speculative_num_draft_tokens
    mla = runner.use_mla_backend
    # Window layers exchange nothing.
    sharded = [layer for layer in layers if not windowed(layer)]
    widths = {config.kv_lora_rank} if mla else {layer.v_head_dim for layer in sharded}
    for width in sorted(widths):
        backend.prepare(
            parallel.dcp_group,
            max_tokens=requests and requests * (drafts or 1),
            num_heads=config.get_max_num_attention_heads() // layout.attn_tp_size,
            head_dim=width,
            dtype=runner.dtype,
            timeout=get_device().watchdog_timeout,
        )


def _most_requests() -> int | None:
    """Of a decode batch that is captured or may run; None where neither was given."""
    captured = get_exec().graph.cuda_graph_config.decode.bs or []
    return max([*captured, get_schedule().max_running_requests or 0], default=0) or None


def prepare_replicated_q_proj(original: Callable[[Any], None], runner: Any) -> None:
    """Upstream's later call: nothing is left to do."""
