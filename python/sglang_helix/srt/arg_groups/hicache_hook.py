"""The hierarchical cache beside a sharded one. Extends `arg_groups/hicache_hook.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_helix.srt.compatibility.verdict import verdict_of


def resolve_hicache_dcp_compatibility(original: Callable[[Any], None], server_args: Any) -> None:
    """Upstream's check, but for GQA without a draft model that the series serves.

    Everything else that upstream refuses here for both is in the compatibility table.
    """
    from sglang.srt.arg_groups.overrides import resolving_view, use_mla_backend

    drafts = resolving_view(server_args).speculative_algorithm not in (None, "NGRAM")
    if use_mla_backend(server_args) or drafts or verdict_of(server_args).kind != "works":
        original(server_args)
