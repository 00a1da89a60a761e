"""Budgets of a prefill batch in widened pages. Extends `managers/schedule_policy.py`."""

from __future__ import annotations

from collections.abc import Callable
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


def add_one_req(
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> Any:
    """Admit a request that has the pool to itself as soon as its tokens fit.

    Upstream keeps a page back for each request, and where end-of-sequence is ignored it looks at
    when the others end, rounding up the prompt. Both are for those who share the pool. A request
    of the pool's last two pages would wait for that page for ever, and all behind it.
    """
    running = adder.running_batch
    if adder.can_run_list or (running is not None and running.reqs):
        return original(adder, req, has_chunked_req, truncation_align_size)
    sampling = req.sampling_params
    kept = adder.per_req_token_overhead, sampling.ignore_eos
    adder.per_req_token_overhead, sampling.ignore_eos = 0, False
    try:
        return original(adder, req, has_chunked_req, truncation_align_size)
    finally:
        adder.per_req_token_overhead, sampling.ignore_eos = kept
