"""Decode and extend by kernels that read a page table: metadata in the place of upstream's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sglang_helix.srt.layers.attention.local_pages import LocalPages
from sglang_helix.srt.layers.attention.prefixes import prefixed, summed
from sglang_helix.srt.layers.attention.sharded import ShardedAttention
from sglang_helix.srt.layers.dcp.partial import Partial

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class ShardedPagedAttention(ShardedAttention):
    """A batch's metadata, for kernels that read a page table.

    It is `cu_q` ([B+1] int32) and `max_q`, which queries are whose; `pages`, the tokens of
    this rank that decode or the queries of a chunk attend, of requests whose queries are
    `cu_cached`'s, all but those that have none; for MLA's gathered prefixes `cu_prefix`; and
    `schedule`, what `deal` makes of decode and verify passes. Upstream's are prepared beside them
    where upstream attends: in the prefill of MLA, and in window layers.
    """

    pages: LocalPages
    cu_q: Tensor
    cu_cached: Tensor
    cu_prefix: Tensor
    max_q: int
    schedule: tuple[Tensor, ...] | None = None

    # Supplied by the adapter.

    def attend_pages(self, q: Any, layer: RadixAttention) -> Partial:
        """The batch's queries over this rank's pages; each sees all tokens of its request.

        q as `partial_decode` or `partial_prefix` has it. Of a window layer, which has one query of
        a request here, the last `local_window` tokens.
        """
        raise NotImplementedError

    def deal(self, pages: LocalPages, cu_q: Tensor, max_q: int) -> tuple[Tensor, ...] | None:
        """How the kernel is to deal out pages among its programs, for max_q queries of a request.

        On the device alone: a captured graph does it anew in every replay. None: the kernel finds
        out by itself.
        """
        return None

    # Seam 3.

    def partial_decode(self, q: Any, layer: RadixAttention, forward_batch: ForwardBatch) -> Partial:
        """See `ShardedAttention.partial_decode`."""
        return self.attend_pages(q, layer)

    def partial_prefix(
        self,
        q: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        gathered: Tensor | None = None,
    ) -> Partial:
        """See `ShardedAttention.partial_prefix`."""
        assert gathered is None
        return self.attend_pages(q, layer)

    # Metadata.

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        self.prepare_writes(forward_batch)
        self.prepare_drafts(forward_batch)
        if self.windows:
            super(ShardedAttention, self).init_forward_metadata(forward_batch)
        mode, batch = forward_batch.forward_mode, forward_batch.batch_size
        requests = forward_batch.req_pool_indices
        lens, longest = forward_batch.seq_lens, _longest(forward_batch.seq_lens_cpu)
        device = lens.device
        if mode.is_decode_or_idle():
            self.cu_q, self.max_q = _steps(batch, 1, device), 1
        elif mode.is_target_verify():
            self.max_q = self.drafts
            self.cu_q = _steps(batch, self.max_q, device)
        else:
            if self.mla:
                super(ShardedAttention, self).init_forward_metadata(forward_batch)
                self.cu_prefix = summed(forward_batch.extend_prefix_lens)
            self.cu_q = summed(forward_batch.extend_seq_lens)
            self.max_q = max(forward_batch.extend_seq_lens_cpu)
            lens = forward_batch.extend_prefix_lens
            longest = max(forward_batch.extend_prefix_lens_cpu)
        self.cu_cached = self.cu_q
        prefix = None if mode.is_decode_or_idle() else prefixed(forward_batch)
        if prefix is not None and not prefix.all:
            which = prefix.requests
            requests, lens = requests[which], lens[which]
            self.cu_cached = summed(forward_batch.extend_seq_lens[which])
        if longest is None:
            longest = self.max_context_len
        self.pages = self.allocate_pages(len(lens), longest)
        self.fill_pages(self.pages, requests, lens)
        reads_alone = mode.is_decode() or mode.is_target_verify()
        self.schedule = self.deal(self.pages, self.cu_q, self.max_q) if reads_alone else None

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate what captured graphs read; filled anew in every replay."""
        self.allocate_captured_writes(max_num_tokens)
        self.allocate_captured_drafts(max_bs, max_num_tokens)
        self.captured_pages = self.allocate_pages(max_bs, self.max_context_len)
        self.captured_cu_q = _steps(max_bs, self.captured_width, self.device)
        if self.windows:
            super(ShardedAttention, self).init_cuda_graph_state(max_bs, max_num_tokens, *args)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Prepare the capture or one replay of a decode graph: what the graph does not itself."""
        self.prepare_captured_drafts(forward_batch, in_capture)
        if self.windows:
            super(ShardedAttention, self).init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Record what a decode graph prepares for itself, of the batch's captured tensors."""
        self.prepare_captured_writes(forward_batch)
        batch = forward_batch.batch_size
        self.pages, self.max_q = self.captured_pages.first(batch), self.captured_width
        self.cu_q = self.cu_cached = self.captured_cu_q[: batch + 1]
        self.fill_pages(self.pages, forward_batch.req_pool_indices, forward_batch.seq_lens)
        # In the memory of the graph, which keeps it for its own.
        self.schedule = self.deal(self.pages, self.cu_q, self.max_q)
        if self.windows:
            super(ShardedAttention, self).init_forward_metadata_in_graph(forward_batch)


def _longest(lens: Tensor | None) -> int | None:
    """Of lengths on the host; None where it does not know them."""
    return None if lens is None or not lens.numel() else int(lens.max())


def _steps(requests: int, queries: int, device: Any) -> Tensor:
    """[B+1] int32: every request has so many queries."""
    return torch.arange(0, requests * queries + 1, queries, dtype=torch.int32, device=device)
