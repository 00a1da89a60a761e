"""What a rank holds of each request of a batch, in the form that paged kernels read.

SGLang's pages of K * p tokens each lie on K ranks, p tokens of one on each, in pool pages of the
same number. So the page table of a rank is upstream's for pages of K * p tokens, the same on all
ranks; only lengths differ.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_helix.srt.layers.dcp.ownership import KVShard

try:
    import triton
    import triton.language as tl
    from sglang.kernels.ops.attention.dcp_kernels import create_triton_kv_indices_for_dcp_triton
except ImportError:
    triton = None

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_BLOCK = 1024  # pages a program looks up


@dataclass(frozen=True)
class LocalPages:
    """Lengths and pages of B requests on this rank; a captured graph reads them in place."""

    lens: Tensor
    """[B] int32, tokens that this rank holds."""
    empty: Tensor
    """[B] bool, whether it holds none: for kernels whose LSE does not say so."""
    table: Tensor
    """[B, W] int32, pool pages in order; what stands behind a request's last page is any page."""

    @classmethod
    def allocate(
        cls, requests: int, tokens: int, shard: KVShard, page_size: int, device: str | torch.device
    ) -> LocalPages:
        """For so many requests of at most `tokens` tokens, over all ranks, each; all empty.

        No wider than a rank needs: kernels take their bound on lengths from the width.
        """
        width = max(1, -(-tokens // (page_size * shard.size)))
        return cls(
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.ones(requests, dtype=torch.bool, device=device),
            torch.zeros(requests, width, dtype=torch.int32, device=device),
        )

    def first(self, requests: int) -> LocalPages:
        """The same memory, for the first so many requests."""
        return LocalPages(self.lens[:requests], self.empty[:requests], self.table[:requests])

    def fill(
        self,
        req_to_token: Tensor,
        requests: Tensor,
        lens: Tensor,
        shard: KVShard,
        page_size: int,
    ) -> None:
        """Set every row, in place and without waiting for the device.

        req_to_token: widened slots, one row a request of the pool. requests [B], rows of it.
        lens [B]: tokens of each request over all ranks.
        """
        span = page_size * shard.size
        if triton is not None and (self.table.is_cuda or _INTERPRETED):
            grid = (len(lens), triton.cdiv(self.table.shape[1], _BLOCK))
            _fill[grid](
                req_to_token,
                req_to_token.stride(0),
                requests,
                lens,
                self.lens,
                self.empty.view(torch.uint8),
                self.table,
                self.table.stride(0),
                self.table.shape[1],
                shard.size,
                shard.rank,
                page_size,
                BLOCK=_BLOCK,
            )
            return
        first = torch.arange(self.table.shape[1], device=lens.device) * span
        self.table.copy_(req_to_token[requests[:, None], first] // span)
        self.lens.copy_(shard.lens(lens))
        torch.eq(self.lens, 0, out=self.empty)


def local_rows(
    req_to_token: Tensor,
    requests: Tensor,
    lens: Tensor,
    shard: KVShard,
    total: int,
    indptr: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of a rank's tokens of each request, one after the other: int32 [total].

    For kernels that read pages of one token. lens [B]: tokens of each request over all ranks;
    total: of them all on this rank, which the host knows. indptr, int32 [at least B + 1], is left
    with the device's prefix sums, from 0, of what the rank has of each. out: memory for the rows.
    """
    held, indptr = shard.lens(lens), indptr[: len(lens) + 1]
    rows = torch.empty(total, dtype=torch.int32, device=lens.device) if out is None else out
    torch.cumsum(held, 0, dtype=torch.int32, out=indptr[1:])
    if lens.is_cuda:
        create_triton_kv_indices_for_dcp_triton[(len(lens),)](
            req_to_token,
            requests,
            held,
            indptr,
            None,
            rows,
            req_to_token.stride(0),
            shard.size,
            shard.rank,
        )
        return rows[:total]
    owner = torch.repeat_interleave(held, output_size=total)
    place = torch.arange(total, device=lens.device) - indptr[owner]
    slots = req_to_token[requests[owner], place * shard.size + shard.rank]
    rows[:total] = slots // shard.size
    return rows[:total]


if triton is not None:
    # Widths change between eager batches, and none may trigger a compilation.
    @triton.jit(do_not_specialize=["slots_stride", "table_stride", "width"])
    def _fill(  # type: ignore[no-untyped-def]
        req_to_token,
        slots_stride,
        requests,
        lens,
        local_lens,
        empty,
        table,
        table_stride,
        width,
        K,
        rank,
        page_size,
        BLOCK: tl.constexpr,
    ):
        """Row program_id(0), BLOCK pages from program_id(1) * BLOCK on."""
        row = tl.program_id(0).to(tl.int64)
        held = ((tl.load(lens + row) + (K - 1 - rank)) // K).to(tl.int32)
        if tl.program_id(1) == 0:
            tl.store(local_lens + row, held)
            tl.store(empty + row, (held == 0).to(tl.uint8))
        pages = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        there = (pages < tl.cdiv(held, page_size)) & (pages < width)
        span = page_size * K
        slots = req_to_token + tl.load(requests + row).to(tl.int64) * slots_stride
        slot = tl.load(slots + pages.to(tl.int64) * span, mask=there, other=0)
        tl.store(table + row * table_stride + pages, (slot // span).to(tl.int32), mask=there)
