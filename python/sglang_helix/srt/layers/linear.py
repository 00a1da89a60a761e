"""Key-value heads sharded by A while query heads stay sharded by N. Extends `layers/linear.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_kv_replicas = 1


@contextmanager
def kv_heads_shared_by(ranks: int) -> Iterator[None]:
    """While building a model: each run of `ranks` consecutive ranks holds the same K and V."""
    global _kv_replicas
    _kv_replicas = ranks
    try:
        yield
    finally:
        _kv_replicas = 1


def qkv_parallel_linear_init(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Give QKVParallelLinear a key-value group of its own inside `kv_heads_shared_by`."""
    if _kv_replicas > 1 and kwargs.get("kv_parallel_group") is None:
        from sglang.srt.layers.linear import ReplicatedParallelGroup

        group = kwargs.get("parallel_group") or "tp"
        kwargs["kv_parallel_group"] = ReplicatedParallelGroup(group, _kv_replicas)
    original(*args, **kwargs)
