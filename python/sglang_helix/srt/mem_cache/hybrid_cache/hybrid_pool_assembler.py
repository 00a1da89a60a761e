"""Which host pool stands behind a sharded one. Extends `hybrid_cache/hybrid_pool_assembler.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as upstream
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.runtime_context import get_memory, get_parallel

from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.mem_cache.pool_host.mha import ShardedMHATokenToKVPoolHost


def build_kv_host_pool(
    original: Callable[..., Any],
    *,
    kv_pool: Any,
    page_size: int,
    host_size: float | None = None,
    mtp_draft_device_pools: tuple[Any, ...] = (),
    pool_label: str = "kv",
    **for_mla: Any,
) -> Any:
    """A host pool for `kv_pool`; page_size is the allocator's, the widened one.

    MLA's is upstream's own. Raises NotImplementedError for K/V pools that have none here.
    """
    if isinstance(kv_pool, MLATokenToKVPool):
        return _tagged(
            original(
                kv_pool=kv_pool,
                page_size=page_size,
                host_size=host_size,
                mtp_draft_device_pools=mtp_draft_device_pools,
                pool_label=pool_label,
                **for_mla,
            )
        )
    kind, buffer_info, options = upstream._mha_host_inputs(kv_pool, mtp_draft_device_pools)
    if kind is not MHATokenToKVPoolHost:
        raise NotImplementedError(
            f"--enable-hierarchical-cache with --dcp-size > 1 has no host pool in place of "
            f"{kind.__name__}: leave --enable-hierarchical-cache out"
        )
    memory = get_memory()
    return _tagged(
        ShardedMHATokenToKVPoolHost(
            buffer_info,
            memory.hicache_ratio,
            memory.hicache_size if host_size is None else host_size,
            page_size,
            memory.hicache_mem_layout,
            shard=KVShard.of(get_parallel()),
            allocator_type=upstream._get_allocator_type(),
            pool_label=pool_label,
            **options,
        )
    )


def _tagged(pool: Any) -> Any:
    """Have storage tell pages of another dtype or memory layout apart: its keys name neither."""
    dtype = str(pool.dtype).removeprefix("torch.")
    pool.storage_format_tag = f"{dtype}-{pool.layout}"
    return pool
