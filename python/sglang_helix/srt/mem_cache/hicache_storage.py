"""Whose pages storage keeps. Extends `mem_cache/hicache_storage.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any


def check_storage_config(original: Callable[[Any], None], config: Any) -> None:
    """Upstream's checks of a rank's share, but that it is MLA's.

    No two ranks keep the same rows of K and V, and their tp rank is in every key; where a
    key-value head is on several groups, each group keeps its own copy.
    """
    if config.dcp_size > 1 and not config.is_mla_model:
        replace(config, is_mla_model=True)  # is checked as it is made
    else:
        original(config)
