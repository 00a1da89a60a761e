"""What a rank prepares between its model and its pool. Extends `model_executor/model_runner.py`.

Replicated projections of MLA: see `replicas`.

Partial results of the Triton adapter's decode: upstream allocates them when the pool has taken its
share.

The exchange, and for `symm` its memory: as soon as the model is there, its heads, widths and dtype
are known; every rank is at this point at the same time; and the pool is sized by what is left. It
is tried once, and no rank goes on where one gets something wrong out of it. So is the gather of
queries.

A draft model needs none of it: inside its scope there is no KVP group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.runtime_context import (
    attention_backends,
    get_device,
    get_exec,
    get_parallel,
    get_schedule,
    get_spec,
)

from sglang_helix.srt.compatibility.situation import replicates_v_proj
from sglang_helix.srt.configs.model_config import sharded_heads
from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.attention.adapters import adapter
from sglang_helix.srt.layers.attention.windows import sharded_layers
from sglang_helix.srt.layers.dcp.exchange import BACKENDS, Exchanger, gathers_by_kernel
from sglang_helix.srt.layers.dcp.probe import probe
from sglang_helix.srt.model_executor import replicas


def load_model(result: None, runner: Any) -> None:
    """After the weights are loaded and before the pool is sized: gather the replicas.

    Their memory is released and resumed with that of the weights.
    """
    for replica, required in replicas.wanted(runner):
        backup = get_exec().features.enable_weights_cpu_backup
        saver = runner.memory_saver_adapter
        with saver.region(GPU_MEMORY_TYPE_WEIGHTS, enable_cpu_backup=backup):
            replica.replicate(runner.model, required=required)


def prepare_decode(result: None, runner: Any) -> None:
    """After the weights are loaded and before the pool is sized: what Triton's decode needs."""
    if get_parallel().attn_dcp_size > 1 and "triton" in attention_backends():
        from sglang_helix.srt.layers.attention.kv_splits import prepare

        decode = get_exec().graph.cuda_graph_config.decode
        captured = 0 if decode.backend == "disabled" else max(decode.bs or [], default=0)
        runner.decode_scratch = prepare(runner, captured, _most_requests() or 1)


def prepare_exchange(result: None, runner: Any) -> None:
    """After the weights are loaded and before the pool is sized: what the exchange needs.

    It is then tried, see `probe`.
    """
    parallel, config = get_parallel(), runner.model_config
    name = parallel.dcp_comm_backend
    if name not in BACKENDS or parallel.attn_dcp_size == 1:
        return
    layout = Layout(parallel.attn_tp_size, parallel.attn_dcp_size)
    requests, drafts = _most_requests(), get_spec().speculative_num_draft_tokens
    if runner.use_mla_backend:
        widths = {config.kv_lora_rank}
        if replicates_v_proj(runner.server_args):
            widths |= {layer.v_head_dim for _, layer in replicas.layers(runner.model)}
    else:
        widths = {layer.v_head_dim for layer in sharded_layers(runner.model, config)}
    max_tokens = requests and requests * (drafts or 1)
    num_heads = sharded_heads(config) // layout.attn_tp_size
    parallel.dcp_group.exchanger = exchanger = Exchanger(name, parallel.dcp_group)
    for width in sorted(widths):
        exchanger.prepare(
            max_tokens=max_tokens,
            num_heads=num_heads,
            head_dim=width,
            dtype=runner.dtype,
            timeout=get_device().watchdog_timeout,
        )
    queries = _query_widths(runner)
    if gathers_by_kernel():
        for parts in queries:
            exchanger.prepare_queries(
                max_tokens=max_tokens,
                num_heads=num_heads,
                widths=parts,
                dtype=runner.dtype,
                timeout=get_device().watchdog_timeout,
            )
    decode = adapter(attention_backends()[1])
    probe(
        exchanger,
        parallel.tp_group.cpu_group,
        num_heads=num_heads,
        head_dims=sorted(widths),
        dtype=runner.dtype,
        base2=decode.base2,
        form=decode.leaves,
        queries=queries,
        max_tokens=max_tokens,
    )


def _query_widths(runner: Any) -> list[tuple[int, ...]]:
    """Of the parts of queries that decode gathers; none where every rank projects all heads'."""
    config = runner.model_config
    if get_parallel().dcp_replicate_q_proj:
        return []
    if runner.use_mla_backend:
        return [(config.kv_lora_rank, config.qk_rope_head_dim)]
    return sorted({(layer.qk_head_dim,) for layer in sharded_layers(runner.model, config)})


def _most_requests() -> int | None:
    """Of a decode batch that is captured or may run; None where neither was given."""
    captured = get_exec().graph.cuda_graph_config.decode.bs or []
    return max([*captured, get_schedule().max_running_requests or 0], default=0) or None


def prepare_replicated_q_proj(original: Callable[[Any], None], runner: Any) -> None:
    """Upstream's later call: nothing is left to do."""
