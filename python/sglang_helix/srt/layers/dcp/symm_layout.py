"""What a rank's workspaces of `symm` hold, and where: see `symm` for why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_helix.srt.layers.dcp.partial import VECTOR_BYTES

TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
SLOTS = 2  # calls take turns with them; the kernels count on two
_LINE_BYTES = 128  # of a GPU's caches
# Virtual ranks on one H200, no link in between; the two choices of the tile were tried by hand.
# A head of 512 elements (MLA, 64 tokens): 80 us as one row, 90 as two, 110 as four, in an earlier
# form of the kernel.
_WIDTH = 512  # elements of a row, at most
_WORDS_PER_THREAD = 64  # half of it, twice the warps: 2% less time at B = 1, 3 to 9% more above
# docs/figures/collectives-h100.csv: over NVLink, 2 and 4 H100s, up to 128 MiB that a rank sends, it
# takes 0.27 to 0.79 of the time of three launches, our own and SGLang's.
_MAX_BYTES = 128 << 20


@triton.constexpr_function
def power_of_2(number):  # type: ignore[no-untyped-def]
    """The next power of two. Where there is no GPU, SGLang replaces Triton's own of that name."""
    return 1 << (number - 1).bit_length()


class Slots:
    """What the workspaces of the exchange and of the gather have in common: rows, in two slots."""

    ranks: int
    max_tokens: int

    @property
    def rows_per_token(self) -> int:
        """Rows that a rank receives per token."""
        raise NotImplementedError

    @property
    def token_bytes(self) -> int:
        """What a rank sends per token, to itself too, without LSEs."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Size of the workspace."""
        raise NotImplementedError

    @cached_property
    def rows(self) -> int:
        """Rows that the workspace holds in a slot, of each rank."""
        return self.max_tokens * self.rows_per_token

    def initialise(self, workspace: torch.Tensor) -> None:
        """Bring a rank's workspace (uint8 [nbytes], 16-byte aligned) into its first state.

        All ranks must have done so before any rank makes its first call.
        """
        workspace.fill_(0xFF)


@dataclass(frozen=True)
class Layout(Slots):
    """What one rank's workspace holds and where; the same on every rank.

    What follows from the attributes is worked out once: every exchange reads it.

    Attributes:
        ranks: N.
        heads: H, query heads of a partial output; need not be divisible by N.
        head_dim: D; rows of D elements must be whole 16-byte vectors.
        wire: dtype of the pieces (bf16, fp16, fp32).
        max_tokens: the largest batch.
        ahead: whether a program sends one row ahead of what it waits for, not all of its rows;
            None: where that was measured and takes no more warps (`sends_ahead`).
    """

    ranks: int
    heads: int
    head_dim: int
    wire: torch.dtype
    max_tokens: int
    ahead: bool | None = None

    def __post_init__(self) -> None:
        _check_wire(self.wire)
        if self.head_dim * self.wire.itemsize % VECTOR_BYTES:
            raise ValueError(
                f"head_dim {self.head_dim} in {self.wire} is not whole 16-byte vectors, which symm "
                f"needs: use --dcp-comm-backend a2a"
            )

    @cached_property
    def owned(self) -> int:
        """Places for heads per rank: ceil(H/N)."""
        return -(-self.heads // self.ranks)

    def owned_by(self, rank: int) -> range:
        """The heads that a rank owns; the last ranks' may be fewer, or none."""
        return range(min(rank * self.owned, self.heads), min((rank + 1) * self.owned, self.heads))

    @cached_property
    def parts(self) -> int:
        """Rows that a head's output of one token is cut into, in whole vectors or 128s."""
        unit = VECTOR_BYTES // self.wire.itemsize
        if self.head_dim % 128 == 0:
            unit = 128
        units = self.head_dim // unit
        fewest = -(-self.head_dim // _WIDTH)
        return next(parts for parts in range(fewest, units + 1) if units % parts == 0)

    @cached_property
    def rows_per_token(self) -> int:
        """Rows that a rank receives per token."""
        return self.owned * self.parts

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row, without its LSE."""
        return self.head_dim // self.parts * self.wire.itemsize

    @cached_property
    def token_bytes(self) -> int:
        """What a rank sends per token, without LSEs."""
        return self.ranks * self.rows_per_token * self.row_bytes

    def _places(self) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of each part of the workspace, in order."""
        sizes = {
            "lse": SLOTS * self.rows * 4 * self.line,
            "data": SLOTS * self.rows * self.ranks * self.row_bytes,
        }
        places, at = {}, 0
        for name, size in sizes.items():
            places[name] = at, size
            at += _align(size)
        return places

    @cached_property
    def line(self) -> int:
        """Words set aside for a row's N LSEs: whole cache lines of its own.

        Programs that polled the same lines held up each other and the senders: 8 virtual ranks,
        GQA, 8 tokens took 6.2 us on an H200 where they shared them, and 4.1 apart.
        """
        return _align(4 * self.ranks) // 4

    @cached_property
    def nbytes(self) -> int:
        """Size of the workspace."""
        at, size = self._places()["data"]
        return _align(at + size)

    @cached_property
    def constants(self) -> Mapping[str, Any]:
        """What the kernel is compiled for; every call shares them, so nobody may write to them."""
        places = {name: at for name, (at, _) in self._places().items()}
        constants = {
            "N": self.ranks,
            "HEADS": self.heads,
            "OWNED": self.owned,
            "PARTS": self.parts,
            "D": self.head_dim // self.parts,
            "WIRE": TL_DTYPE[self.wire],
            "ROWS": self.rows,
            "LINE": self.line,
            "DATA": places["data"],
            "LSES": places["lse"],
            "AHEAD": self.sends_ahead,
        }
        return MappingProxyType(constants)

    @cached_property
    def sends_ahead(self) -> bool:
        """Whether rows of a partial output are sent one ahead; of splits, which are merged first,
        all are.

        docs/figures/variants-h200x2.csv: between 2 GPUs up to 1.36 times faster from 256 tokens of
        MLA and 1024 of GQA on, elsewhere the same. With 8 ranks, where a program of MLA spills
        unless it has twice the warps, it was 1.13 to 1.19 times faster from 64 tokens on, but by
        virtual ranks of one device alone (docs/figures/variants-h200.csv).
        """
        return self.ranks <= 4 if self.ahead is None else self.ahead

    def warps(self, splits: bool) -> int:
        """Warps per program: the pieces of a row, of all ranks, are one tile in registers."""
        return self._warps[splits]

    @cached_property
    def _warps(self) -> dict[bool, int]:
        return {splits: self._warps_of(splits) for splits in (False, True)}

    def _warps_of(self, splits: bool) -> int:
        words = self.head_dim // self.parts if splits else self.row_bytes // 4
        tile = power_of_2(self.ranks) * power_of_2(words)
        share = _WORDS_PER_THREAD
        if splits or self.sends_ahead:  # sums, or what all turns have in common, are held beside it
            share //= 2
        return max(1, tile // (32 * share))


@dataclass(frozen=True)
class QueryLayout(Slots):
    """What one rank's workspace of the gather holds; the same on every rank.

    A row is a token and a place among a rank's own heads; of each rank it holds one piece, the
    parts of its query one after the other.

    Attributes:
        ranks: N.
        heads: H, those of all ranks; N divides them.
        widths: elements of each part of a query, in order: one, or MLA's latent and rope part.
        wire: dtype of the queries (bf16, fp16, fp32).
        max_tokens: the largest batch.
    """

    ranks: int
    heads: int
    widths: tuple[int, ...]
    wire: torch.dtype
    max_tokens: int

    def __post_init__(self) -> None:
        _check_wire(self.wire)
        if self.heads % self.ranks or len(self.widths) not in (1, 2):
            raise ValueError(
                f"symm gathers one or two parts of queries of as many heads from every rank, not "
                f"{len(self.widths)} of {self.heads} heads from {self.ranks} ranks"
            )
        if any(width * self.wire.itemsize % VECTOR_BYTES for width in self.widths):
            raise ValueError(
                f"parts of {self.widths} elements in {self.wire} are not whole 16-byte vectors, "
                "which symm needs to gather queries"
            )

    @cached_property
    def owned(self) -> int:
        """Heads of each rank."""
        return self.heads // self.ranks

    @cached_property
    def rows_per_token(self) -> int:
        """Rows that a rank receives per token."""
        return self.owned

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Of four bytes, in each part of a piece."""
        return tuple(width * self.wire.itemsize // 4 for width in self.widths)

    @cached_property
    def token_bytes(self) -> int:
        """What a rank sends per token, to itself too."""
        return self.heads * 4 * sum(self.words)

    @cached_property
    def nbytes(self) -> int:
        """Size of the workspace."""
        return _align(SLOTS * self.max_tokens * self.token_bytes)

    @cached_property
    def constants(self) -> Mapping[str, Any]:
        """What the kernel is compiled for; every call shares them, so nobody may write to them."""
        left, right = (*self.words, 0)[:2]
        constants = {
            "N": self.ranks,
            "OWNED": self.owned,
            "LEFT": left,
            "RIGHT": right,
            "ROWS": self.rows,
        }
        return MappingProxyType(constants)

    @cached_property
    def warps(self) -> int:
        """Warps per program: the pieces of a row, of all ranks, are tiles in registers."""
        tiles = power_of_2(self.ranks) * sum(map(power_of_2, self.words))
        return power_of_2(-(-tiles // (32 * _WORDS_PER_THREAD)))


def _check_wire(wire: torch.dtype) -> None:
    if wire not in TL_DTYPE:
        raise TypeError(f"symm exchanges bf16, fp16 or fp32 rows, not {wire}")


def _align(size: int) -> int:
    return -(-size // _LINE_BYTES) * _LINE_BYTES


def largest_batch(layout: Slots, wanted: int | None = None) -> int:
    """Tokens of the largest batch to make a workspace for; the layout's own number does not matter.

    Above some size a collective should be taken. wanted: the caller's largest batch, if known.
    """
    most = max(1, _MAX_BYTES // layout.token_bytes)
    return min(wanted or most, most)
