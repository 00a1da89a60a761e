"""What the launcher refuses: ranks without the series. Extends `engine.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_helix import helix
from sglang_helix.srt.compatibility.verdict import stages_of, verdict_of
from sglang_helix.srt.managers.scheduler import OTHER_NODES, SERIES_KEY, series_of


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
    """Raise SeriesError unless every rank reports the same series and the same layout.

    infos: one ready message per scheduler process of this node, or the data-parallel
        controller's, which carries the reports of all its processes. On the first node rank 0's
        carries those of the other nodes.
    """
    from sglang.srt.runtime_context import get_parallel, get_server_args

    serves = verdict_of(get_server_args()).kind == "works"
    expected = series_of(stages_of(get_server_args()))
    reports: list[dict[str, Any]] = []
    for info in infos:
        report = info.get(SERIES_KEY, {})
        reports += report if isinstance(report, list) else [report]
    reports += [other for report in reports for other in report.get(OTHER_NODES, [])]
    for index, report in enumerate(reports):
        found = report.get("series", "without the series")
        if found != expected:
            raise helix.SeriesError(
                f"scheduler process {index} runs {found}, the launcher {expected}. Every rank must "
                "run the same series, or answers would be wrong: see that process's log, "
                f"{helix.RUN_THE_SAME}."
            )
    ranks, parallel = 1, get_parallel()
    if serves:
        ranks = parallel.tp_size * parallel.pp_size * parallel.dp_size
        ranks //= parallel.nnodes if parallel.node_rank else 1
    if len(reports) < ranks:
        raise helix.SeriesError(
            f"{len(reports)} scheduler processes of at least {ranks} have said what they run. "
            "Every rank must run the same series, or answers would be wrong: see the log of those "
            "that are missing."
        )
