"""All ranks of a one-kernel exchange in one process, and the answer they must give."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits
from sglang_helix.srt.layers.dcp.symm import RECEIVE, SEND
from sglang_helix.srt.layers.dcp.symm_launch import exchange, gather
from sglang_helix.srt.layers.dcp.symm_layout import Layout, QueryLayout
from sglang_helix.srt.layers.dcp.symm_workspace import one_device

T = TypeVar("T")
INF = float("inf")
EMPTY = (-INF, INF, float("nan"))  # what an LSE says where a shard has no token


class Ranks:
    """N ranks on one device: one cooperative launch on CUDA, any order in the interpreter.

    There, ranks send one after another and then receive one after another, in random order: the
    interpreter runs one program at a time, so a program that waits would wait for ever.
    """

    def __init__(
        self, layout: Layout | QueryLayout, device: str, warps: int | None = None, seed: int = 0
    ):
        self.layout, self.random = layout, random.Random(seed)
        if device == "cpu":
            warps = warps or 5  # fewer than rows, as a rule: then programs carry several
        self.together = one_device(layout, torch.device(device), warps)
        self.apart = [
            replace(self.together, rank=rank, local_ranks=1, epochs=self.together.epochs[rank])
            for rank in range(layout.ranks)
        ]

    def share(self) -> None:
        """Let processes that are forked from this one be the ranks: they write to one memory."""
        self.together.memory.share_memory_()
        self.together.peers.copy_(torch.tensor([b.data_ptr() for b in self.together.memory]))

    def __call__(self, x: torch.Tensor, lse: torch.Tensor, **options) -> list[Partial]:
        """x [N*B, H, D] and lse [N*B, H], batches of the ranks stacked -> result of each rank."""
        if x.is_cuda:
            return self.launched(Partial(x, lse), **options)
        N = self.layout.ranks
        partials = [Partial(x, lse)] * N
        if len(x):
            partials = list(map(Partial, x.chunk(N), lse.chunk(N)))
        return self.separately(partials, **options)

    def masked(
        self, x: torch.Tensor, lse: torch.Tensor, empty: torch.Tensor, **options
    ) -> list[Partial]:
        """The same of rows of which empty [N*B] says that they have no keys."""
        if x.is_cuda:
            return self.launched(Masked(x, lse, empty), **options)
        N = self.layout.ranks
        partials = list(map(Masked, x.chunk(N), lse.chunk(N), empty.chunk(N)))
        return self.separately(partials, **options)

    def _sinks_of(self, rank: int, sinks: torch.Tensor) -> torch.Tensor:
        """Of all heads' sinks [H] a rank's own, in as many places as a rank may own."""
        own = sinks[[*self.layout.owned_by(rank)]]
        return torch.nn.functional.pad(own, (0, self.layout.owned - len(own)), value=-INF)

    def launched(self, partial: Partial | Splits | Masked, **options):
        """One launch for all ranks."""
        if (sinks := options.get("sinks")) is not None:
            places = [self._sinks_of(rank, sinks) for rank in range(self.layout.ranks)]
            options["sinks"] = torch.cat(places)
        reduced = exchange(self.together, partial, **options)
        return [
            Partial(*(self._own(rank, part) for part in reduced))
            for rank in range(self.layout.ranks)
        ]

    def separately(self, partials: list[Partial | Splits] | list[Masked], **options):
        """One launch per rank and phase."""
        results = {}
        sinks = options.pop("sinks", None)
        for phase in (SEND, RECEIVE):
            for rank in self.random.sample(range(self.layout.ranks), self.layout.ranks):
                if sinks is not None:
                    options["sinks"] = sinks[[*self.layout.owned_by(rank)]]
                results[rank] = exchange(self.apart[rank], partials[rank], phase=phase, **options)
        return [results[rank] for rank in range(self.layout.ranks)]

    def out_of_step(self, calls: int, launch: Callable[[int, int, int], T]) -> list[list[T]]:
        """Results by call and rank of launch(call, rank, phase), in an order drawn anew.

        A rank sends as soon as it has ended its last call, and receives once all have sent.
        """
        N = self.layout.ranks
        sent, ended = [0] * N, [0] * N
        results: list[list[Any]] = [[None] * N for _ in range(calls)]
        while min(ended) < calls:
            able = [
                rank
                for rank in range(N)
                if (sent[rank] == ended[rank] < calls) or ended[rank] < min(sent)
            ]
            rank = self.random.choice(able)
            call, sends = ended[rank], sent[rank] == ended[rank]
            results[call][rank] = launch(call, rank, SEND if sends else RECEIVE)
            if sends:
                sent[rank] += 1
            else:
                ended[rank] += 1
        return results

    def _own(self, rank: int, part: torch.Tensor) -> torch.Tensor:
        B = len(part) // self.layout.ranks
        columns = len(self.layout.owned_by(rank)) * (part.shape[1] // self.layout.owned)
        return part[rank * B : (rank + 1) * B, :columns]


class QueryRanks(Ranks):
    """The same of the gather."""

    def __call__(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """Parts [N*T, H/N, W_i], those of the ranks stacked -> result of each rank."""
        if parts[0].is_cuda:
            return list(gather(self.together, parts).unflatten(0, (self.layout.ranks, -1)))
        return self.queries_out_of_step([parts])[0]

    def queries_out_of_step(
        self, calls: list[tuple[torch.Tensor, ...]]
    ) -> list[list[torch.Tensor]]:
        """Results by call and rank."""
        N = self.layout.ranks

        def launch(call: int, rank: int, phase: int) -> torch.Tensor:
            own = [part.unflatten(0, (N, -1))[rank] for part in calls[call]]
            return gather(self.apart[rank], own, phase=phase)

        return self.out_of_step(len(calls), launch)


def expected(
    x: torch.Tensor, lse: torch.Tensor, ranks: int, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combination of stacked partials by definition, in float64: out [B, H, D], lse [B, H]."""
    lse = lse.unflatten(0, (ranks, -1)).double()
    x = x.unflatten(0, (ranks, -1)).double()
    lse = torch.where(lse.isfinite(), lse, -INF)
    x = torch.where((lse == -INF)[..., None], 0.0, x)
    if sinks is not None:  # a token more, with no value
        lse = torch.cat([lse, sinks.double().expand(1, *lse.shape[1:])])
        x = torch.cat([x, torch.zeros_like(x[:1])])
    total = torch.logsumexp(lse, 0)
    weight = torch.where(total == -INF, 0.0, torch.exp(lse - total))
    return (x * weight[..., None]).sum(0), total


def poison(x: torch.Tensor, lse: torch.Tensor, share: float = 0.15) -> None:
    """Empty some shards: their LSE says so in one of three ways, their output is garbage."""
    for nothing in EMPTY:
        gone = torch.rand(lse.shape, device=lse.device) < share / len(EMPTY)
        lse.masked_fill_(gone, nothing)
        x.masked_fill_(gone[..., None], float("nan"))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got - want‖ / ‖want‖, NaN and shapes included."""
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
