"""Reports of the ranks behind a data-parallel controller. Extends `data_parallel_controller.py`."""

from __future__ import annotations

from typing import Any

from sglang_helix.srt.managers.scheduler import SERIES_KEY


def add_series_reports(result: dict[str, Any], controller: Any) -> None:
    """Add to the controller's ready message what each rank of its replicas has reported.

    With `--dp-size` > 1 the launcher hears from the controller alone, and upstream passes on the
    first rank's numbers only.
    """
    result[SERIES_KEY] = [info.get(SERIES_KEY, {}) for info in controller._scheduler_init_infos]
