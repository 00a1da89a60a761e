"""How many tokens a request may generate. Extends `mem_cache/allocator/base.py`."""

from __future__ import annotations

from typing import Any


def max_new_tokens_for_memory(
    allocator: Any, input_tokens: int, max_new_tokens: int, *, token_capacity: int, **_: Any
) -> int:
    """`max_new_tokens`, or as many as the empty pool has slots for behind the prompt.

    Upstream keeps a page back, and the rest of the prompt's last one: of a sharded pool's K times
    longer pages, a prompt of five in a pool of six would get no token at all. What a request does
    need beyond its tokens is what a decode step allocates ahead, draft tokens among it.
    """
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    room = token_capacity - input_tokens - get_alloc_reserve_per_decode()
    return max(0, min(max_new_tokens, room))
