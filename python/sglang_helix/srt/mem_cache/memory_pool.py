"""Writing to a sharded MLA pool by combined rows. Extends `mem_cache/memory_pool.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
