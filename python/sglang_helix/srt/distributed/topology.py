"""Seam 1, topology: how the ranks of one tensor-parallel group share attention.

N = tp_size ranks; attention shards heads over A = N / K of them; the K ranks that hold the same
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

    def kvp_groups(self, world_size: int) -> list[list[int]]:
        """KVP groups of a world of whole tensor-parallel groups: K consecutive ranks each."""
        return [
            list(range(start, start + self.kvp_size))
            for start in range(0, world_size, self.kvp_size)
        ]

    def kv_heads(self, total: int) -> int:
        """Key-value heads that each rank computes and stores, of `total` in the model."""
        return max(1, total // self.attn_tp_size)

    def check_heads(self, query_heads: int, kv_heads: int) -> None:
        """Raise LayoutError unless the heads of a GQA or MHA model can be laid out.

        N must divide the query heads, and A and the key-value heads must divide one another:
        otherwise a rank would need parts of heads, or heads of two shards.
        """
        if problem := self._head_problem(query_heads, kv_heads):
            works = [
                size
                for size in divisors(self.tp_size)
                if not Layout(self.tp_size, size)._head_problem(query_heads, kv_heads)
            ]
            advice = f"use one of {works}" if works else "change --tp-size"
            raise LayoutError(
                f"--dcp-size {self.kvp_size} with --tp-size {self.tp_size}: {problem}; {advice}"
            )

    def _head_problem(self, query_heads: int, kv_heads: int) -> str | None:
        shards = self.attn_tp_size
        if query_heads % self.tp_size:
            return f"{query_heads} query heads cannot be split over {self.tp_size} ranks"
        if shards % kv_heads and kv_heads % shards:
            return (
                f"{kv_heads} key-value heads and {shards} attention shards "
                "(tp size / dcp size) do not divide one another"
            )
        return None


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in rising order."""
    return [size for size in range(1, number + 1) if number % size == 0]
