"""Attention heads sharded by A inside a model sharded by N. Extends `layers/linear.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_replicas = 1
_replicate_queries = False


@contextmanager
def heads_shared_by(ranks: int, *, queries: bool) -> Iterator[None]:
    """While building a model: each run of `ranks` consecutive ranks holds the same K and V heads.

    With `queries` they hold the same query heads too, so that queries need no gathering.
    """
    global _replicas, _replicate_queries
    _replicas, _replicate_queries = ranks, queries
    try:
        yield
    finally:
        _replicas, _replicate_queries = 1, False


def qkv_parallel_linear_init(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Give QKVParallelLinear the groups of `heads_shared_by` in place of the whole TP group."""
    if _replicas > 1 and kwargs.get("kv_parallel_group") is None:
        from sglang.srt.layers.linear import ReplicatedParallelGroup

        shared = ReplicatedParallelGroup(kwargs.get("parallel_group") or "tp", _replicas)
        kwargs["kv_parallel_group"] = shared
        if _replicate_queries:
            kwargs["parallel_group"] = shared
    original(*args, **kwargs)
