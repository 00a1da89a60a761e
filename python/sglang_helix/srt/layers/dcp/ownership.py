"""Seam 2, shard ownership: which cache rows a rank holds.

SGLang's allocator hands out *widened* slots: K times as many as a rank has rows, in pages that
are K times as long. Slot s belongs to the rank with place s % K in its KVP group, which keeps it
in row s // K. Pages start at multiples of K, so slot and position agree modulo K and rank j holds
the tokens at positions j, j + K, j + 2K, ... of every request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Lens = TypeVar("Lens", torch.Tensor, int)


@dataclass(frozen=True)
class KVShard:
    """A rank's share of the cache: K = size ranks, this one with place `rank`."""

    size: int
    rank: int

    @classmethod
    def of(cls, parallel: Any) -> KVShard:
        """This rank's, by SGLang's `get_parallel()`."""
        return cls(parallel.attn_dcp_size, parallel.attn_dcp_rank)

    def lens(self, lens: Lens) -> Lens:
        """How many of the first `lens` tokens of each request this rank holds (same shape)."""
        return (lens + (self.size - 1 - self.rank)) // self.size

    def read_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of this rank's tokens, from the slots of one request's tokens 0, 1, 2, ..."""
        return slots[self.rank :: self.size] // self.size

    def write_rows(self, slots: torch.Tensor, page_size: int) -> torch.Tensor:
        """Row to write for each slot [T]; tokens of other ranks go to the scratch page.

        SGLang never allocates page 0 (padded tokens are written there), so a write to its
        `page_size` rows is harmless. Sending foreign tokens there keeps shapes static, which a
        captured graph needs, and lets the pool's own store kernel do the writing; spreading
        them over the page keeps a long prefill from hammering a single row.
        """
        scratch = scratch_rows(slots.shape[0], page_size, slots.device)
        return self.rows_or(slots, scratch)

    def rows_or(self, slots: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """int64 [T]: row to write for each slot, or of those of other ranks what scratch has."""
        own = slots % self.size == self.rank
        return torch.where(own, slots // self.size, scratch)


def scratch_rows(count: int, page_size: int, device: str | torch.device) -> torch.Tensor:
    """Of page 0, over and over, for so many tokens: int64 [count]."""
    return torch.arange(count, device=device) % page_size
