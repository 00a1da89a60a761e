"""The hierarchical cache beside a sharded one. Extends `arg_groups/hicache_hook.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def resolve_hicache_dcp_compatibility(original: Callable[[Any], None], server_args: Any) -> None:
    """Upstream's check for MLA alone: it refuses GQA, which the series has a host pool for.

    Everything else that upstream refuses here for both is in the compatibility table.
    """
    from sglang.srt.arg_groups.overrides import use_mla_backend

    if use_mla_backend(server_args):
        original(server_args)
