"""Partial attention, in the three forms that seam 3 hands to seam 4.

`Partial` is what every exchange takes. The others are one step earlier, and an exchange that can
take that step on the way saves a launch, and memory traffic. `Splits`: decoding that cuts a rank's
tokens into splits leaves one partial result for each; otherwise `lse_combine.combine_splits` merges
them. `Masked`: a kernel's LSEs do not say which queries have no keys; otherwise `Masked.marked`
writes it into them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# `symm` moves rows of an output in vectors of this size.
VECTOR_BYTES = 16
# Splits that are read one after the other, at most: arithmetic from the latency of a load, about
# half a microsecond, against the 2 of a launch; not measured.
_FEW = 8


class Partial(NamedTuple):
    """Attention of B queries over some of their keys."""

    out: torch.Tensor
    """[B, H, D], normalised over these keys alone; where there are none, anything."""
    lse: torch.Tensor
    """[B, H] fp32, log-sum-exp of the logits; -inf, NaN or +inf where there are no keys."""


class Masked(NamedTuple):
    """What a kernel leaves that cannot be told to attend nothing.

    No field has the name of an LSE, so that nobody takes these for LSEs of a `Partial`.
    """

    out: torch.Tensor
    """[B, H, D], as of `Partial`."""
    unmarked: torch.Tensor
    """[B, H] fp32, log-sum-exp of the logits; where there are no keys, anything."""
    empty: torch.Tensor
    """[B] bool, contiguous: which queries have no keys."""

    def marked(self) -> Partial:
        """The same with LSEs of -inf where there are no keys: one launch."""
        return Partial(self.out, self.unmarked.masked_fill(self.empty[:, None], -torch.inf))


class Splits(NamedTuple):
    """What split-KV decoding leaves before its own reduction (SGLang's Triton backend).

    Sequence b has indptr[b+1] - indptr[b] tokens, dealt in order to counts[b] splits of equal
    length rounded up to whole blocks; splits that begin behind the end were never written, and
    hold anything.
    """

    out: torch.Tensor
    """[B, H, S, D] fp32: softmax-normalised output of each split."""
    lse: torch.Tensor
    """[B, H, S] fp32, natural logarithm."""
    indptr: torch.Tensor
    """[B+1] integer, prefix sums of local lengths."""
    counts: torch.Tensor
    """[B] integer, splits per sequence, at most S."""
    block: int
    """Tokens of a block (upstream's _MIN_BLOCK_KV)."""
    v_scale: float = 1.0
    """Dequantisation scale of the values."""

    @property
    def few(self) -> bool:
        """Whether an exchange may reduce them one after the other, on the way.

        It has one program for a row, which reads the splits of N heads in turn. Beyond a few, a
        launch of its own, with programs of many splits at a time, is faster. The shape decides,
        which captured graphs fix.
        """
        return self.out.shape[2] <= _FEW
