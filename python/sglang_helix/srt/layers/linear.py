"""Attention heads sharded by A inside a model sharded by N. Extends `layers/linear.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Inside `heads_shared_by`: how many ranks share heads, whose (query heads, key-value heads) they
# are, and whether queries are shared too.
_shared: tuple[int, tuple[int, int], bool] | None = None


@contextmanager
def heads_shared_by(ranks: int, heads: tuple[int, int], *, queries: bool) -> Iterator[None]:
    """While building a model: each run of `ranks` consecutive ranks holds the same K and V heads.

    heads: query and key-value heads of the model's attention; projections of other numbers belong
    to something else, a vision encoder say. With `queries` the ranks hold the same query heads
    too, so that queries need no gathering.
    """
    global _shared
    _shared = ranks, heads, queries
    try:
        yield
    finally:
        _shared = None


def qkv_parallel_linear_init(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Give QKVParallelLinear the groups of `heads_shared_by` in place of the whole TP group."""
    names = ("self", "hidden_size", "head_size", "total_num_heads", "total_num_kv_heads")
    given = dict(zip(names, args, strict=False)) | kwargs
    heads = given["total_num_heads"]
    if (
        _shared is not None
        and (heads, given.get("total_num_kv_heads") or heads) == _shared[1]
        and given.get("parallel_group") != "replicated"
        and given.get("kv_parallel_group") is None
    ):
        from sglang.srt.layers.linear import ReplicatedParallelGroup

        shared = ReplicatedParallelGroup(given.get("parallel_group") or "tp", _shared[0])
        kwargs["kv_parallel_group"] = shared
        if _shared[2]:
            kwargs["parallel_group"] = shared
    original(*args, **kwargs)


def is_shared(projection: Any) -> bool:
    """Whether a QKVParallelLinear was built with the groups of `heads_shared_by`."""
    from sglang.srt.layers.linear import _ReplicatedGroup

    return isinstance(projection.kv_tp_group, _ReplicatedGroup)
