"""What is cached of a batch's requests, as the host knows it, and where each one's tokens begin."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Prefixed(NamedTuple):
    """A run of a batch's requests, their queries, and whether it is all of them."""

    requests: slice
    tokens: slice
    all: bool


def prefixed(forward_batch: ForwardBatch) -> Prefixed | None:
    """The requests of a batch that attend cached tokens: the same on every rank.

    None where there are none. The number of *local* cached tokens does not count: with a short
    prefix some ranks hold none, and a rank that skipped the exchange would leave its peers waiting
    for ever. All requests where the host does not know.
    """
    lens = forward_batch.extend_prefix_lens_cpu
    if lens is None or forward_batch.forward_mode.is_target_verify():
        return Prefixed(slice(None), slice(None), True)
    return with_prefixes(lens, forward_batch.extend_seq_lens_cpu)


def with_prefixes(prefix_lens: Sequence[int], extend_lens: Sequence[int]) -> Prefixed | None:
    """From the first to the last request that has cached tokens; None where no request has any.

    prefix_lens, extend_lens: cached tokens and queries of each request.
    """
    having = [request for request, length in enumerate(prefix_lens) if length]
    if not having:
        return None
    first, end = having[0], having[-1] + 1
    before, own = sum(extend_lens[:first]), slice(first, end)
    queries = sum(extend_lens[own])
    return Prefixed(own, slice(before, before + queries), end - first == len(prefix_lens))


def summed(lens: Tensor) -> Tensor:
    """[B+1] int32: where each request's tokens begin, and where the last one's end."""
    return torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))


def summed_on_host(lens: Iterable[int]) -> Tensor:
    """Prefix sums on the host, from 0: int32 [B + 1]."""
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
