"""Pools beside the sharded one. Extends `mem_cache/kv_cache_configurator.py`.

A draft model's is whole, and says so.

Of models with sliding windows, layers that see everything are sharded by sequence: their pool has a
K-th of the rows, as every sharded pool has. Window layers stay as plain TP keeps them: their pool,
SGLang's second one, is whole on every rank. One allocator serves both. It hands out widened slots,
and each page of K * p of them has a page of as many rows in the pool of the windows:

    full layers     rows R of this rank     slots R * K     pages of p rows, of K * p slots
    window layers   rows S                  slots S         pages of K * p rows
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule

from sglang_helix.helix import SeriesError


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


def configure(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    """The pools and their sizes. Of full layers upstream tells slots where nothing is sharded."""
    result = original(configurator, **kwargs)
    if not configurator.is_hybrid_swa:
        return result
    slots = result.full_max_total_num_tokens * get_parallel().attn_dcp_size
    return msgspec.structs.replace(result, full_max_total_num_tokens=slots)


def logical_token_capacity(configurator: Any, *, max_total_num_tokens: int) -> int:
    """Tokens of requests that so many rows of a rank hold; upstream never widens windows."""
    return max_total_num_tokens * get_parallel().attn_dcp_size // configurator.loc_space_scale


def build_hybrid_swa_kv_pool(
    original: Callable[..., Any],
    configurator: Any,
    *,
    full_max_total_num_tokens: int,
    swa_max_total_num_tokens: int,
    mha_pool_class: type,
) -> SWAKVPool:
    """Two pools of their own heads, widths and pages; upstream gives both the same pages."""
    parallel, model, layers = get_parallel(), configurator.model_config, configurator.layer_info
    common = {
        "device": configurator.device,
        "enable_memory_saver": get_exec().features.enable_memory_saver,
    }
    full = {
        **common,
        "page_size": configurator.pool_page_size,
        "head_num": model.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size),
        "head_dim": model.head_dim,
        "v_head_dim": model.v_head_dim,
        "allocation_label": "Full",
    }
    windows = {
        **common,
        "page_size": configurator.pool_page_size * parallel.attn_dcp_size,
        "head_num": model.get_swa_num_kv_heads(parallel.attn_tp_size),
        "head_dim": model.swa_head_dim,
        "v_head_dim": model.swa_v_head_dim,
        "allocation_label": "SWA",
    }
    return SWAKVPool(
        size=full_max_total_num_tokens,
        size_swa=swa_max_total_num_tokens,
        page_size=full["page_size"],
        dtype=configurator.kv_cache_dtype,
        head_num=full["head_num"],
        head_dim=full["head_dim"],
        swa_attention_layer_ids=layers.swa_attention_layer_ids,
        full_attention_layer_ids=layers.full_attention_layer_ids,
        token_to_kv_pool_class=mha_pool_class,
        full_kv_pool_kwargs=full,
        swa_kv_pool_kwargs=windows,
        **common,
    )


def build_token_to_kv_pool_allocator(
    original: Callable[..., Any], configurator: Any, **kwargs: Any
) -> Any:
    """Where the model has windows, upstream's allocator of both pools, in widened pages."""
    pool, sizes = kwargs["token_to_kv_pool"], kwargs["sizes"]
    if not isinstance(pool, SWAKVPool):
        return original(configurator, **kwargs)
    size = get_parallel().attn_dcp_size
    return SWATokenToKVPoolAllocator(
        sizes.full_max_total_num_tokens * size,
        sizes.swa_max_total_num_tokens,
        page_size=get_schedule().page_size * size,
        dtype=configurator.kv_cache_dtype,
        device=configurator.device,
        kvcache=pool,
        need_sort=False,
        req_to_token_pool=kwargs["req_to_token_pool"],
    )
