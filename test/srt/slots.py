"""Widened slots as SGLang's paged allocator hands them out, in an order that hides no mistake."""

import random

import torch


class Slots:
    """An allocator of K-fold slots in K-fold pages; page 0 is never handed out.

    `of[request]` lists the slots of a request's tokens, grown by `extend`.
    """

    def __init__(self, ranks: int, page_size: int, pages: int, seed: int = 0) -> None:
        self.page = page_size * ranks
        self._free = list(range(1, pages))
        random.Random(seed).shuffle(self._free)
        self.rows = pages * page_size
        self.of: dict[int, list[int]] = {}

    def extend(self, request: int, count: int) -> list[int]:
        """Slots of the next `count` tokens of a request; a page is filled before the next."""
        slots = self.of.setdefault(request, [])
        start = len(slots)
        for position in range(start, start + count):
            offset = position % self.page
            page = slots[-1] // self.page if offset else self._free.pop()
            slots.append(page * self.page + offset)
        return slots[start:]

    def table(self) -> torch.Tensor:
        """SGLang's req_to_token: one row per request, padded with a slot nobody has."""
        width = max(map(len, self.of.values()), default=0)
        rows = [self.of.get(r, []) for r in range(max(self.of, default=-1) + 1)]
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
