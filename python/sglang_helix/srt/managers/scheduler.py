"""Each rank says that it runs the series. Extends `managers/scheduler.py`."""

from __future__ import annotations

from typing import Any

SERIES_KEY = "sglang_helix"


def add_series_report(result: dict[str, Any], scheduler: Any) -> None:
    """Add to the ready message what this rank has installed: series version, N and K.

    Raises SeriesError where the rank's attention backend cannot serve its layout.
    """
    from sglang.srt.runtime_context import get_parallel

    from sglang_helix import __version__, plugin
    from sglang_helix.srt.layers.attention.attention_registry import check_backend

    parallel = get_parallel()
    if parallel.attn_dcp_size > 1:
        runner = scheduler.tp_worker.model_runner
        check_backend(runner.attn_backend, mla=runner.use_mla_backend)
    result[SERIES_KEY] = {
        "version": __version__,
        "stages": sorted(plugin.installed_stages()),
        "tp_size": parallel.tp_size,
        "dcp_size": parallel.attn_dcp_size,
        "dcp_comm_backend": parallel.dcp_comm_backend,
    }
