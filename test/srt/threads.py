"""Ranks as threads of one process: fast enough for many cases, and a deadlock shows."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from sglang_helix.srt.layers.dcp.exchange import BACKENDS, Exchanger

# Seconds that a rank waits for the others; what they do meanwhile may be interpreted kernels.
TIMEOUT = 120.0


class ThreadGroup:
    """One rank's view of a group of threads; has the collectives of SGLang's GroupCoordinator.

    A rank that waits alone gets threading.BrokenBarrierError.
    """

    exchanger: Exchanger

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, desk: list[Any]) -> None:
        self.rank_in_group, self.world_size = rank, size
        self._barrier, self._desk = barrier, desk

    def _exchange(self, mine: torch.Tensor) -> list[torch.Tensor]:
        self._desk[self.rank_in_group] = mine.clone()
        self._barrier.wait(TIMEOUT)
        everyone = list(self._desk)
        self._barrier.wait(TIMEOUT)
        return everyone

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(input_), dim=dim)

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        output.copy_(torch.cat(self._exchange(input)).view_as(output))

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        parts = [sent.chunk(self.world_size)[self.rank_in_group] for sent in self._exchange(input)]
        output.copy_(torch.cat(parts))

    def reduce_scatter_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        total = torch.stack(self._exchange(input)).sum(0)
        output.copy_(total.chunk(self.world_size)[self.rank_in_group])


_this_thread = threading.local()


def get_parallel() -> Any:
    """In the place of SGLang's function of this name: what a thread's rank is."""
    return _this_thread.parallel


def run_threads(function: Callable[..., Any], size: int, *args: Any, **parallel: Any) -> list[Any]:
    """Call ``function(rank, group, *args)`` on `size` ranks of one KVP group; results by rank.

    parallel: further attributes of what `get_parallel` answers there.
    """
    barrier, desk = threading.Barrier(size), [None] * size

    def call(rank: int) -> Any:
        group = ThreadGroup(rank, size, barrier, desk)
        if (backend := parallel.get("dcp_comm_backend")) in BACKENDS:
            group.exchanger = Exchanger(backend, group)
        _this_thread.parallel = SimpleNamespace(
            dcp_group=group,
            dcp_enabled=size > 1,
            dcp_size=size,
            dcp_rank=rank,
            attn_dcp_size=size,
            attn_dcp_rank=rank,
            **{"attn_tp_size": parallel.get("tp_size"), **parallel},
        )
        try:
            return function(rank, group, *args)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(call, rank) for rank in range(size)]
    failures = [failure for future in futures if (failure := future.exception())]
    # What a rank raised by itself says more than that the others waited for it in vain.
    failures.sort(key=lambda failure: isinstance(failure, threading.BrokenBarrierError))
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
