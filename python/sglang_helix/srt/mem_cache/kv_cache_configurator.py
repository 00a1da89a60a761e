"""The pool of a draft model. Extends `mem_cache/kv_cache_configurator.py`."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from sglang_helix.hook import SeriesError


def mark_replicated(pools: Any, configurator: Any, **kwargs: Any) -> None:
    """After `_init_pools`: a draft's pool says that it is whole, so that nothing goes by owner."""
    if configurator.loc_space_scale == 1:
        return
    pool = pools.token_to_kv_pool
    if not isinstance(pool, MHATokenToKVPool | MLATokenToKVPool):
        raise SeriesError(
            f"a draft model with a cache of its own kind ({type(pool).__name__}) is not supported "
            "beside --dcp-size: use another draft model"
        )
    pool.dcp_replicated = True
