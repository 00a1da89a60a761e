"""Writing to sharded pools, moving rows in them, and keeping them on the host.

Extends `mem_cache/memory_pool.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_helix.srt.layers.dcp.ownership import KVShard


def mla_set_kv_buffer(
    original: Callable[..., None],
    pool: Any,
    layer: Any,
    loc_info: Any,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor | None,
    layer_id_override: int | None = None,
) -> None:
    """Store latent and rotary parts in one row: cache_k [T, 1, kv_lora_rank + rope].

    Upstream asserts here under DCP, for its callers disagree on the slot space. The ones that
    reach it with the series (MLA's un-absorbed prefill on platforms other than CUDA) bring
    widened slots, which `set_mla_kv_buffer` resolves to their owner.
    """
    if pool.write_loc_is_dcp_resolved or pool.dcp_replicated:
        original(pool, layer, loc_info, cache_k, cache_v, layer_id_override)
        return
    rank = pool.kv_lora_rank
    pool.set_mla_kv_buffer(
        layer, loc_info, cache_k[..., :rank], cache_k[..., rank:], layer_id_override
    )


def move_kv_cache(
    original: Callable[..., None], pool: Any, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy what every layer keeps from slots src_loc to slots tgt_loc, as if at once.

    int64 [N], widened, the same on every rank of the KVP group: all of them must call it. A token
    whose two slots have different owners crosses the group, so the owners' rows are gathered.
    A draft's pool is whole, and moves its own rows.
    """
    if getattr(pool, "dcp_replicated", False):
        original(pool, tgt_loc, src_loc)
        return
    shard = KVShard.of(get_parallel())
    buffers = getattr(pool, "kv_buffer", None) or (*pool.k_buffer, *pool.v_buffer)
    # What stands in a row that another rank owns is not looked at.
    rows = torch.cat([buffer[src_loc // shard.size].flatten(1) for buffer in buffers], dim=1)
    everyones = get_parallel().dcp_group.all_gather(rows, dim=0).view(shard.size, *rows.shape)
    moved = everyones[src_loc % shard.size, torch.arange(len(src_loc), device=rows.device)]
    to = shard.write_rows(tgt_loc, pool.page_size)
    widths = [buffer[0].numel() for buffer in buffers]
    for buffer, values in zip(buffers, moved.split(widths, dim=1), strict=True):
        buffer[to] = values.view(-1, *buffer.shape[1:])


def get_cpu_copy(
    original: Callable[..., Any],
    pool: Any,
    indices: torch.Tensor,
    mamba_indices: torch.Tensor | None = None,
    req_pool_index: int | None = None,
) -> Any:
    """K and V of a request's slots, int64 [S], widened: those that this rank owns, on the host.

    The slots are those of the request's tokens 0, 1, 2, ...
    """
    return original(pool, _owned(pool, indices), mamba_indices, req_pool_index)


def load_cpu_copy(
    original: Callable[..., None],
    pool: Any,
    kv_cache_cpu: Any,
    indices: torch.Tensor,
    mamba_indices: torch.Tensor | None = None,
    req_pool_index: int | None = None,
) -> None:
    """Put what `get_cpu_copy` kept into the slots that the request has now.

    A token's owner is that of its position, so it is still this rank.
    """
    original(pool, kv_cache_cpu, _owned(pool, indices), mamba_indices, req_pool_index)


def _owned(pool: Any, slots: torch.Tensor) -> torch.Tensor:
    """Rows of a request's slots that this rank owns; of a draft's pool, which is whole, all."""
    whole = getattr(pool, "dcp_replicated", False)
    return slots if whole else KVShard.of(get_parallel()).read_rows(slots)
