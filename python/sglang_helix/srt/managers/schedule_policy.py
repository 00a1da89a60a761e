"""Budgets of a prefill batch in widened pages. Extends `managers/schedule_policy.py`."""

from __future__ import annotations

from typing import Any


def prefill_adder_init(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand PrefillAdder the allocator's page size, K times the pool's.

    The scheduler passes the pool's. Budgets would then round to pages that the allocator does
    not have, and chunks would end between its pages.
    """
    names = ("self", "page_size", "tree_cache", "token_to_kv_pool_allocator")
    given = dict(zip(names, args, strict=False)) | kwargs
    page_size = given["token_to_kv_pool_allocator"].page_size
    if "page_size" in kwargs:
        return args, {**kwargs, "page_size": page_size}
    return (args[0], page_size, *args[2:]), kwargs
