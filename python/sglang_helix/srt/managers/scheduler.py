"""What each rank runs, and which prompts it takes. Extends `managers/scheduler.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from sglang_helix import advice, helix
from sglang_helix.srt.compatibility.rows.caches import STORAGE
from sglang_helix.srt.compatibility.situation import replicates_v_proj, situation_of
from sglang_helix.srt.compatibility.verdict import verdict_of
from sglang_helix.srt.configs.model_config import sharded_heads
from sglang_helix.srt.distributed.topology import Layout

logger = logging.getLogger(__name__)

SERIES_KEY = "sglang_helix"
#: Beside it: head shards (A), and ranks that split a sequence (K).
LAYOUT_KEYS = ("attn_tp_size", "kvp_size")
#: In the report of rank 0: those of the other nodes' ranks.
OTHER_NODES = "other_nodes"


def add_series_report(result: dict[str, Any], scheduler: Any) -> None:
    """Add to the ready message what this rank has installed and what its pool holds.

    The launcher compares `series`, and `/server_info` shows the whole report, and the layout by
    `LAYOUT_KEYS`. `kv_tokens`: tokens the pool holds, over all ranks of a KVP group.
    `kv_bytes`: its size on this rank. `draft_kv_bytes`: the size of the draft model's cache, which
    every rank has whole, where there is one.

    Raises SeriesError where the rank's attention backend cannot serve its layout, and on rank 0
    where a rank of another node does not become ready.
    """
    from sglang.srt.runtime_context import get_parallel, get_server_args

    from sglang_helix.srt.layers.attention.attention_registry import check_backend

    parallel = get_parallel()
    runner = scheduler.tp_worker.model_runner
    layout = Layout(parallel.attn_tp_size, parallel.attn_dcp_size)
    report = {
        "series": series_of(helix.installed_stages()),
        "kv_tokens": scheduler.max_total_num_tokens,
        "kv_bytes": kv_bytes(runner.token_to_kv_pool),
    }
    if draft := draft_runner(scheduler):
        report["draft_kv_bytes"] = kv_bytes(draft.token_to_kv_pool)
    result[SERIES_KEY] = report
    result |= {key: getattr(layout, key) for key in LAYOUT_KEYS}
    if verdict_of(get_server_args()).kind == "works":
        check_backend(runner.attn_backend, mla=runner.use_mla_backend)
        for line in describe(layout, runner, report):
            logger.info(line)
    if "serve" in helix.installed_stages() and parallel.nnodes > 1:
        from sglang.srt.model_executor.model_runner_components.load_model_utils import (
            UNBALANCED_MODEL_LOADING_TIMEOUT_S,
        )

        from sglang_helix.srt.distributed.agreement import Agreement

        # Nothing of a start keeps ranks further apart than loading may.
        all_reports = Agreement.of_process().gather(report, UNBALANCED_MODEL_LOADING_TIMEOUT_S)
        if all_reports is not None:
            report[OTHER_NODES] = all_reports[len(all_reports) // parallel.nnodes :]


def init_req_max_new_tokens(original: Callable[..., None], scheduler: Any, req: Any) -> None:
    """Bound a request's answer by the pool, and refuse a prompt that leaves none.

    Upstream answers that one with no token and finish reason `length`. It also shortens a prompt
    (`--allow-auto-truncate`) only after it has found no room behind the whole one.
    """
    from sglang.srt.managers.utils import validate_input_length
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
    from sglang.srt.runtime_context import get_serving

    shortens = get_serving().allow_auto_truncate
    if shortens:
        validate_input_length(req, scheduler.max_req_input_len, True)
    asked = req.sampling_params.max_new_tokens
    original(scheduler, req)
    length = len(req.origin_input_ids)
    # A longer one that is not shortened is refused next, by its length.
    fits = shortens or length < scheduler.max_req_input_len
    if fits and asked != 0 == req.sampling_params.max_new_tokens:
        req.set_finish_with_abort(
            f"Input length ({length} tokens) leaves no room for an answer: the KV cache holds "
            f"{scheduler.max_total_num_tokens} tokens, and a step takes "
            f"{get_alloc_reserve_per_decode()} ahead, draft tokens among them. Use a shorter input."
        )


def attach_hicache_storage(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """`PUT /hicache/storage-backend`: 400 with the reason of the flag's rows, or SGLang's step."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput
    from sglang.srt.runtime_context import get_server_args

    situation = situation_of(get_server_args())
    storage = SimpleNamespace(
        hicache_storage_backend=recv_req.hicache_storage_backend, dcp_size=situation.args.dcp_size
    )
    asked = replace(situation, args=storage)
    for row in STORAGE:
        if message := row.refusal(asked):
            return AttachHiCacheStorageReqOutput(success=False, message=message)
    return original(scheduler, recv_req)


def draft_runner(scheduler: Any) -> Any:
    """The runner of a scheduler's draft model; None where it has none: no drafts, or n-grams."""
    worker = getattr(scheduler.draft_worker, "draft_worker", None)
    return getattr(worker, "draft_runner", None)


def kv_bytes(pool: Any) -> int | None:
    """Size of a pool that can be sharded; None for SGLang's others, not all of which say.

    Beside states or windows that of the full layers.
    """
    from sglang.srt.mem_cache.memory_pool import (
        HybridLinearKVPool,
        MHATokenToKVPool,
        MLATokenToKVPool,
    )
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    if isinstance(pool, HybridLinearKVPool | SWAKVPool):
        pool = pool.full_kv_pool
    if not isinstance(pool, MHATokenToKVPool | MLATokenToKVPool):
        return None
    size = pool.get_kv_size_bytes()
    return int(sum(size) if isinstance(size, tuple) else size)


def state_slots(runner: Any) -> tuple[int, int] | None:
    """Recurrent states that this rank can hold, and their size; None where a model has none."""
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool

    pool = runner.req_to_token_pool
    if not isinstance(pool, HybridReqToTokenPool):
        return None
    return pool.mamba_pool.size, int(pool.mamba_pool.mamba_cache.mem_usage_bytes())


def describe(layout: Layout, runner: Any, report: dict[str, Any]) -> list[str]:
    """The layout of this rank in words: sizes, groups, heads, and capacity beside plain TP."""
    import torch
    from sglang.srt.runtime_context import get_parallel

    parallel, model = get_parallel(), runner.model_config
    rank, world = parallel.tp_rank, parallel.world_group
    groups = layout.attn_tp_groups(world.world_size)
    attn_tp_group = next(group for group in groups if world.rank in group)
    heads = sharded_heads(model)
    kv_heads = None if runner.use_mla_backend else model.get_total_num_kv_heads()
    held = "the latent" if kv_heads is None else f"{layout.kv_heads(kv_heads)} of {kv_heads} K/V"
    plain = int(report["kv_tokens"] / layout.capacity_ratio(kv_heads))
    drafts = report.get("draft_kv_bytes")
    states = []
    if (slots := state_slots(runner)) is not None:
        states = [
            f"Recurrent states: {slots[0]} in {slots[1] / 2**30:.2f} GiB of each rank, as plain TP "
            "holds them; --max-mamba-cache-size and --mamba-full-memory-ratio say how many"
        ]
    replicas, place = parallel.attn_dp_size, parallel.attn_tp_rank
    whose = f" of each of {replicas} attention replicas" if replicas > 1 else ""
    lines = [
        f"Layout: N = {layout.tp_size} ranks{whose}; attention on A = {layout.attn_tp_size} head "
        f"shards, each of K = {layout.kvp_size} ranks that split the sequence; FFN on all "
        f"{parallel.tp_size if whose else 'N'}",
        f"Rank {rank}: head shard {layout.attn_shard(place)}, place {layout.kvp_rank(place)}; "
        f"KVP group {parallel.dcp_group.ranks}, attention TP group {attn_tp_group}",
        f"Heads: attends {heads // layout.attn_tp_size} query heads of {heads} over its tokens, "
        f"ends with {heads // layout.tp_size}; caches {held}",
        f"KV cache: {report['kv_tokens']} tokens in {report['kv_bytes'] / 2**30:.2f} GiB of each "
        f"rank; plain TP would hold {plain}",
        *(
            [f"Draft model: a cache of all these tokens, {drafts / 2**30:.2f} GiB of each rank"]
            if drafts
            else []
        ),
        *states,
    ]
    if replicates_v_proj(runner.server_args):
        lines.append(_describe_values(runner))
    if runner.is_hybrid_swa:
        lines.append(_describe_windows(runner, report["kv_tokens"]))
    if torch.cuda.is_available():
        exchange, replicated = parallel.dcp_comm_backend, bool(parallel.dcp_replicate_q_proj)
        device = torch.cuda.get_device_name()
        lines += advice.on_start(layout, model, device, exchange, replicated)
    return lines


def _describe_values(runner: Any) -> str:
    """Where MLA's values are projected, and what it takes of each rank."""
    from sglang_helix.srt.model_executor.replicas import VALUES
    from sglang_helix.srt.models.value_switch import switch

    taken = VALUES.nbytes(runner.model) / 2**30
    return (
        f"Values: projected before the exchange in decode batches of {switch()}, by weights of all "
        f"heads of the group in {taken:.2f} GiB of each rank (--dcp-replicate-v-proj)"
    )


def _describe_windows(runner: Any, tokens: int) -> str:
    """The pool of the windows, which plain TP has as well, and how much of it is ever needed."""
    from sglang.srt.model_executor.pool_configurator import compute_swa_request_cap
    from sglang.srt.runtime_context import get_parallel, get_schedule

    pool = runner.token_to_kv_pool.swa_kv_pool
    needed = compute_swa_request_cap(
        page_size=runner.token_to_kv_pool_allocator.page_size,
        window=runner.sliding_window_size,
        attn_dp_size=get_parallel().attn_dp_size,
        max_running_requests=runner.max_running_requests,
    )
    return (
        f"Sliding windows: {pool.size} tokens in {sum(pool.get_kv_size_bytes()) / 2**30:.2f} GiB "
        f"of each rank (--swa-full-tokens-ratio {get_schedule().swa_full_tokens_ratio:g}), whole "
        f"as in plain TP; {runner.max_running_requests} running requests need {needed}, a ratio of "
        f"{needed / tokens:.2g}, and what they leave full layers have"
    )


def series_of(stages: frozenset[str]) -> dict[str, Any]:
    """What must be the same on every rank: version, verdict, stages, layout, as they are here."""
    from sglang.srt.runtime_context import get_parallel, get_server_args

    parallel = get_parallel()
    return {
        "version": helix.__version__,
        "verdict": verdict_of(get_server_args()).kind,
        "stages": sorted(stages),
        "tp_size": parallel.tp_size,
        "dcp_size": parallel.attn_dcp_size,
        "dcp_comm_backend": parallel.dcp_comm_backend,
        "dcp_replicate_q_proj": bool(parallel.dcp_replicate_q_proj),
        "dcp_replicate_v_proj": replicates_v_proj(get_server_args()),
    }
