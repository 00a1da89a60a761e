"""The launcher serves only when every rank runs the series. Extends `entrypoints/engine.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_helix.hook import SeriesError
from sglang_helix.srt.managers.scheduler import SERIES_KEY, series_of


def launch_scheduler_processes(
    original: Callable[..., tuple[Any, Any]], *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """Wrap `wait_for_ready` of the launch result: it raises where a rank lacks the series."""
    result, processes = original(*args, **kwargs)
    upstream_wait = result.wait_for_ready

    def wait_for_ready() -> None:
        upstream_wait()
        check_reports(result.scheduler_infos)

    result.wait_for_ready = wait_for_ready
    return result, processes


def check_reports(infos: list[dict[str, Any]]) -> None:
    """Raise SeriesError unless all ranks report the same series and the same layout.

    infos: one ready message per scheduler process of this node, or the data-parallel
        controller's, which carries the reports of all its processes.
    """
    from sglang.srt.runtime_context import get_parallel

    sharded = get_parallel().attn_dcp_size > 1
    expected = series_of(frozenset({"launch", "serve"} if sharded else {"launch"}))
    reports: list[dict[str, Any]] = []
    for info in infos:
        report = info.get(SERIES_KEY, {})
        reports += report if isinstance(report, list) else [report]
    for index, report in enumerate(reports):
        found = report.get("series", "without sglang-helix")
        if found != expected:
            raise SeriesError(
                f"scheduler process {index} runs {found}, the launcher {expected}. Every rank must "
                "run the same series, or answers would be wrong: see that process's log, install "
                "the same sglang-helix everywhere and leave it in SGLANG_PLUGINS."
            )
