"""Reports of the ranks behind a data-parallel controller. Extends `data_parallel_controller.py`."""

from __future__ import annotations

from typing import Any

from sglang_helix.srt.managers.scheduler import LAYOUT_KEYS, SERIES_KEY


def add_series_reports(result: dict[str, Any], controller: Any) -> None:
    """Add to the controller's ready message what each rank of its replicas has reported.

    With `--dp-size` or `--attn-dp-size` > 1 the launcher hears from the controller alone, and
    upstream passes on the first rank's numbers only. The layout is the same in all replicas.
    """
    infos = controller._scheduler_init_infos
    result[SERIES_KEY] = [info.get(SERIES_KEY, {}) for info in infos]
    result |= {key: infos[0][key] for key in LAYOUT_KEYS if key in infos[0]}
