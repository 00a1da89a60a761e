"""Exact conservation of a sharded pool.

Extends `managers/scheduler_components/invariant_checker.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_full_pool(
    original: Callable[..., tuple[bool, str]], checker: Any, ps: Any, uncached: int = 0
) -> tuple[bool, str]:
    """At idle, whether any slot of this rank is lost or counted twice: (leak, message).

    Upstream lets every difference pass under DCP. The allocator and the prefix tree both count
    whole widened pages, so when no request holds a slot the sum is exact.
    """
    leak, message = original(checker, ps, uncached)
    if uncached:
        return leak, message
    held = slots_of(checker)
    slots = held.pop("slots")
    held["session"] = checker.pool_stats_observer.session_held_tokens()
    return sum(held.values()) != slots, f"[sharded pool] slots={slots}, {held}; {message}"


def slots_of(owner: Any) -> dict[str, int]:
    """Slots of a scheduler's (or its checker's) pool, in whole widened pages, and who holds them.

    The rest of `slots` that is not free, evictable or protected is held by requests that run.
    """
    allocator, tree = owner.token_to_kv_pool_allocator, owner.tree_cache
    # Recurrent states and windows are not sharded, and upstream counts them exactly.
    hybrid = owner.is_hybrid_ssm or owner.is_hybrid_swa
    if owner.is_hybrid_swa:
        allocator = allocator.full_attn_allocator
    return {
        "slots": allocator.size // allocator.page_size * allocator.page_size,
        "free": allocator.available_size(),
        "evictable": tree.full_evictable_size() if hybrid else tree.evictable_size(),
        "protected": tree.full_protected_size() if hybrid else tree.protected_size(),
    }
