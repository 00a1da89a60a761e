"""Each rank says what it runs. Extends `managers/scheduler.py`."""

from __future__ import annotations

from typing import Any

SERIES_KEY = "sglang_helix"


def add_series_report(result: dict[str, Any], scheduler: Any) -> None:
    """Add to the ready message what this rank has installed and what its pool holds.

    The launcher compares `series`, and `/server_info` shows the whole report. `kv_tokens`: tokens
    the pool holds, over all ranks of a KVP group. `kv_bytes`: its size on this rank.

    Raises SeriesError where the rank's attention backend cannot serve its layout.
    """
    from sglang.srt.runtime_context import get_parallel

    from sglang_helix import plugin
    from sglang_helix.srt.layers.attention.attention_registry import check_backend

    runner = scheduler.tp_worker.model_runner
    if get_parallel().attn_dcp_size > 1:
        check_backend(runner.attn_backend, mla=runner.use_mla_backend)
    size = runner.token_to_kv_pool.get_kv_size_bytes()
    result[SERIES_KEY] = {
        "series": series_of(plugin.installed_stages()),
        "kv_tokens": scheduler.max_total_num_tokens,
        "kv_bytes": int(sum(size) if isinstance(size, tuple) else size),
    }


def series_of(stages: frozenset[str]) -> dict[str, Any]:
    """What must be the same on every rank: version, stages and layout, as this process has them."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_helix import __version__

    parallel = get_parallel()
    return {
        "version": __version__,
        "stages": sorted(stages),
        "tp_size": parallel.tp_size,
        "dcp_size": parallel.attn_dcp_size,
        "dcp_comm_backend": parallel.dcp_comm_backend,
    }
