"""Fused rotary embedding and cache write under a sharded cache. Extends `models/utils.py`."""

from __future__ import annotations

from typing import Any


def enable_fused_set_kv_buffer(forward_batch: Any) -> bool:
    """Never: the fused kernel writes at widened slots, beyond the end of a sharded pool."""
    return False
