"""Seam 1, topology: how the ranks of one tensor-parallel group share attention.

N = tp_size ranks, or under attention data parallelism those of one replica, SGLang's
attn_tp_size; attention shards heads over A = N / K of them; the K ranks that hold the same
heads (a KVP group, SGLang's decode-context-parallel group) split the sequence of their cache.
Ranks are numbered inside the tensor-parallel group: rank r works on attention shard r // K and
has place r % K in its KVP group. After the exchange it owns query heads
[r * H / N, (r + 1) * H / N): the slice that an N-way row-parallel output projection expects.
"""

from __future__ import annotations

from dataclasses import dataclass


class LayoutError(ValueError):
    """A layout that cannot be right; the message names the flags, the values and what works."""


@dataclass(frozen=True)
class Layout:
    """Sizes of one tensor-parallel group: N = tp_size and K = kvp_size (SGLang's dcp_size)."""

    tp_size: int
    kvp_size: int

    def __post_init__(self) -> None:
        if self.kvp_size < 1 or self.tp_size % self.kvp_size:
            raise LayoutError(
                f"--dcp-size {self.kvp_size} does not divide --tp-size {self.tp_size}: "
                f"use one of {divisors(self.tp_size)}"
            )

    @property
    def attn_tp_size(self) -> int:
        """A, the number of head shards of attention."""
        return self.tp_size // self.kvp_size

    def attn_shard(self, rank: int) -> int:
        """Which of the A head shards `rank` works on."""
        return rank // self.kvp_size

    def kvp_rank(self, rank: int) -> int:
        """Place of `rank` in its KVP group: it stores the tokens t with t % K == place."""
        return rank % self.kvp_size

    def attn_tp_groups(self, world_size: int) -> list[list[int]]:
        """Attention TP groups: ranks with the same place in their KVP groups, A each, strided."""
        return [
            list(range(start + place, start + self.tp_size, self.kvp_size))
            for start in range(0, world_size, self.tp_size)
            for place in range(self.kvp_size)
        ]

    def kvp_groups(self, world_size: int) -> list[list[int]]:
        """KVP groups of a world of whole tensor-parallel groups: K consecutive ranks each."""
        return [
            list(range(start, start + self.kvp_size))
            for start in range(0, world_size, self.kvp_size)
        ]

    def kv_heads(self, total: int) -> int:
        """Key-value heads that each rank computes and stores, of `total` in the model."""
        return max(1, total // self.attn_tp_size)

    def capacity_ratio(self, kv_heads: int | None) -> float:
        """Tokens that a rank's cache memory holds, over what plain TP holds in the same memory.

        kv_heads: of the model; None for MLA, whose latent every rank stores whole.
        """
        if kv_heads is None:
            return self.kvp_size
        plain = Layout(self.tp_size, 1).kv_heads(kv_heads)
        return self.kvp_size * plain / self.kv_heads(kv_heads)

    def check_heads(self, query_heads: int, kv_heads: int, *, decoupled: bool = False) -> None:
        """Raise LayoutError unless the heads of a model can be laid out.

        N must divide the query heads, and A and the key-value heads must divide one another:
        otherwise a rank would need parts of heads, or heads of two shards. N and the key-value
        heads too: SGLang's attention classes assert it when they are built. MLA's latent counts
        as one key-value head. `decoupled`: the user gave A and not K, so errors speak of A.
        """
        if problem := self._head_problem(query_heads, kv_heads):
            works = legal_layouts(self.tp_size, query_heads, kv_heads)
            if decoupled:
                flag, value = "--attn-tp-size", self.attn_tp_size
                sizes = sorted(layout.attn_tp_size for layout in works)
            else:
                flag, value = "--dcp-size", self.kvp_size
                sizes = [layout.kvp_size for layout in works]
            advice = f"use one of {sizes}" if sizes else "change --tp-size"
            raise LayoutError(f"{flag} {value} with --tp-size {self.tp_size}: {problem}; {advice}")

    def _head_problem(self, query_heads: int, kv_heads: int) -> str | None:
        shards = self.attn_tp_size
        if query_heads % self.tp_size:
            return f"{query_heads} query heads cannot be split over {self.tp_size} ranks"
        if self.tp_size % kv_heads and kv_heads % self.tp_size:
            return (
                f"{kv_heads} key-value heads and {self.tp_size} ranks do not divide one another, "
                "which SGLang's attention classes require"
            )
        if shards % kv_heads and kv_heads % shards:
            return (
                f"{kv_heads} key-value heads and {shards} attention shards "
                "(tp size / dcp size) do not divide one another"
            )
        return None


def legal_layouts(tp_size: int, query_heads: int, kv_heads: int) -> list[Layout]:
    """Every layout of N ranks that a model's heads allow, with rising K."""
    layouts = [Layout(tp_size, size) for size in divisors(tp_size)]
    return [layout for layout in layouts if not layout._head_problem(query_heads, kv_heads)]


def layout_of(tp_size: int, attn_tp_size: int, dcp_size: int, replicas: int = 1) -> Layout:
    """The layout of `--attn-tp-size`, which fixes K = N / A; `dcp_size` is 1 where not given.

    replicas: of attention, which share the `tp_size` ranks. Raises LayoutError where they do not
    divide those, where A does not divide N, or where `--dcp-size` was given and disagrees.
    """
    ranks = ranks_of_replica(tp_size, replicas)
    named = f"--tp-size {tp_size}" + (f" / --attn-dp-size {replicas}" if replicas > 1 else "")
    if attn_tp_size < 1 or ranks % attn_tp_size:
        raise LayoutError(
            f"--attn-tp-size {attn_tp_size} does not divide {named}: use one of {divisors(ranks)}"
        )
    layout = Layout(ranks, ranks // attn_tp_size)
    if dcp_size not in (1, layout.kvp_size):
        raise LayoutError(
            f"--attn-tp-size {attn_tp_size} with {named} means --dcp-size "
            f"{layout.kvp_size}, but --dcp-size {dcp_size} was given: leave one of them out"
        )
    return layout


def ranks_of_replica(tp_size: int, replicas: int) -> int:
    """N of each of so many attention replicas. Raises LayoutError where it is no whole number."""
    if replicas < 1 or tp_size % replicas:
        raise LayoutError(
            f"--attn-dp-size {replicas} does not divide --tp-size {tp_size}: "
            f"use one of {divisors(tp_size)}"
        )
    return tp_size // replicas


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in rising order."""
    return [size for size in range(1, number + 1) if number % size == 0]
