"""What Triton's kernels read of a batch. Extends `layers/attention/triton_backend.py`.

Upstream lists the rows of every request, of this rank's tokens alone, for eager batches and for
captured graphs. Here are the parts of its metadata that a sharded cache has otherwise: lists as
long as the host knows, splits by what the adapter's decode fills, masks of drafts without columns
for what is cached, and windows.

Window layers with a pool of their own decode over upstream's list of the rows in their window,
which leaves out one key: W - 1 of them where all other kernels, and the models, see W. Here it has
W. Other window layers have a list of the W / K rows that this rank holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from torch import Tensor

from sglang_helix.srt.layers.attention.kv_splits import Scratch
from sglang_helix.srt.layers.attention.prefixes import prefixed, summed
from sglang_helix.srt.layers.attention.sharded import ShardedAttention
from sglang_helix.srt.layers.attention.windows import window_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class WindowRows(NamedTuple):
    """Rows of windows cut by owner, of a decode batch of B requests; graphs read them in place.

    indptr [B+1] int32; indices int64, one request after the other; counts [B] int32 of splits.
    """

    indptr: Tensor
    indices: Tensor
    counts: Tensor

    @classmethod
    def allocate(cls, requests: int, window: int, device: str) -> WindowRows:
        """For so many requests of at most `window` rows each; all empty."""
        return cls(
            torch.zeros(requests + 1, dtype=torch.int32, device=device),
            torch.zeros(requests * window, dtype=torch.int64, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
        )

    def first(self, requests: int) -> WindowRows:
        """The same memory, for the first so many requests."""
        return WindowRows(self.indptr[: requests + 1], self.indices, self.counts[:requests])


class ShardedTritonRows(ShardedAttention, TritonAttnBackend):
    """A batch's metadata, for Triton's kernels.

    It is upstream's `forward_metadata`; `window_rows`, which decode reads in windows cut by owner;
    and of an extend or a verify pass `prefixes`: where the queries of each request that has a
    prefix begin, and where its keys.
    """

    sliding_window_size: int | None
    prefixes: tuple[Tensor, Tensor]
    window_rows: WindowRows
    captured_window_rows: WindowRows

    def __init__(self, model_runner: ModelRunner, **kwargs: Any) -> None:
        super().__init__(model_runner, **kwargs)
        self.scratch: Scratch = model_runner.decode_scratch
        # Upstream's own buffers, which are not read, as small as it makes them.
        self.max_kv_splits = 1
        self.nothing_before = torch.zeros_like(self.kv_indptr)
        # Nor is its mask of drafts, a column for each token of the longest context.
        self.num_draft_tokens = None
        if self.window:
            self.sliding_window_size = None  # upstream's list is of all ranks' tokens
        elif self.windows:
            # Its layers' own: the model's method, or its configuration, may name another.
            self.sliding_window_size = window_of(model_runner.model) - 1

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        self._most_rows = self._rows_to_read(forward_batch)
        if forward_batch.forward_mode.is_decode_or_idle():
            with self._whole_windows():
                super().init_forward_metadata(forward_batch)
            if self.window:
                self.window_rows = self._no_window_rows(forward_batch.batch_size)
                self._list_window(forward_batch, self.window_rows)
            return
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            counts = torch.empty(forward_batch.batch_size, dtype=torch.int32, device=self.device)
            self.get_num_kv_splits(counts, self.shard.lens(forward_batch.seq_lens))
            self._show_drafts(counts, self._masks(forward_batch.batch_size, self.drafts))
        else:
            self.prefixes = self._prefixes(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate what captured graphs read; filled anew before every replay."""
        # Without splits and rows of its own, which upstream sizes by the longest context.
        super().init_cuda_graph_state(max_bs, max_num_tokens, self.scratch.indices, *args[1:])
        self.captured_masks = self._masks(max_bs, self.captured_width)
        self.captured_queries = self.captured_masks // self.captured_width
        if self.window:
            self.captured_window_rows = self._no_window_rows(max_bs)
        if self.windows and self.sliding_window_size is not None:
            # Upstream has as much for windows as for a rank's share of the context.
            self.cuda_graph_window_kv_indices = torch.zeros(
                max_num_tokens * (self.sliding_window_size + 1),
                dtype=torch.int64,
                device=self.device,
            )

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Prepare the capture or one replay of a decode graph, in place."""
        with self._whole_windows():
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if in_capture and forward_batch.forward_mode.is_target_verify():
            batch = forward_batch.batch_size
            counts = self.cuda_graph_num_kv_splits[:batch]
            self._show_drafts(counts, self.captured_masks[: batch + 1])
        if self.window:
            rows = self.captured_window_rows.first(forward_batch.batch_size)
            self._list_window(forward_batch, rows)
            if in_capture:
                self.window_rows = rows

    # Splits, rows, and where a chunk's begin.

    def get_num_kv_splits(
        self, num_kv_splits: Tensor, seq_lens: Tensor, uneven_batch: Tensor | None = None
    ) -> None:
        """Splits of each request of a decode batch, from its local length."""
        self.scratch.plan.count(seq_lens, num_kv_splits)

    def _dcp_lens(self, lens: Tensor, start: Tensor | None = None) -> Tensor:
        """Tokens of this rank: upstream's numbers, of a request's first in a third of the ops."""
        if start is None and self.dcp_size == self.shard.size:
            return self.shard.lens(lens)
        found: Tensor = super()._dcp_lens(lens, start)
        return found

    def _dcp_kv_indices(
        self,
        req_pool_indices: Tensor,
        lens: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor | None = None,
        kv_start_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of this rank's tokens. Upstream would ask the device how many, and wait for it."""
        if kv_indices is None:
            kv_indices = torch.empty(self._most_rows, dtype=torch.int64, device=self.device)
        return super()._dcp_kv_indices(req_pool_indices, lens, kv_indptr, kv_indices, kv_start_idx)

    def _rows_to_read(self, forward_batch: ForwardBatch) -> int:
        """Rows of this rank that a batch reads, or a little more, by what the host knows."""
        batch = forward_batch.batch_size
        if forward_batch.forward_mode.is_decode_or_idle():
            tokens = forward_batch.seq_lens_sum
        elif (prefixes := forward_batch.extend_prefix_lens_cpu) is not None:
            tokens = sum(prefixes)
        else:
            tokens = None
        if tokens is None:
            tokens = batch * self.max_context_len
        return (tokens + batch * (self.shard.size - 1)) // self.shard.size

    def _prefixes(self, forward_batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Of requests that have a prefix: where each one's queries, and where its keys begin."""
        metadata, prefix = self.forward_metadata, prefixed(forward_batch)
        if prefix is not None and self.mla:
            return metadata.qo_indptr, summed(forward_batch.extend_prefix_lens)
        queries, keys = metadata.qo_indptr, metadata.kv_indptr
        if prefix is not None and not prefix.all:
            first, end = prefix.requests.start, prefix.requests.stop + 1
            queries, keys = queries[first:end] - prefix.tokens.start, keys[first:end]
        return queries, keys

    def mask_columns_before(self) -> Tensor:
        """Where the chunk's own columns of each request's mask start, summed up as an indptr.

        A chunk with pictures (Gemma-4) brings a mask, a row per token, that begins with the cached
        tokens; the kernel finds the rest of them by the number of cached tokens. Masks of drafts
        are of them alone, and other chunks have none.
        """
        metadata, rows = self.forward_metadata, self.forward_metadata.qo_indptr
        if metadata.custom_mask is None or metadata.num_kv_splits is not None:
            return self.nothing_before[: len(rows)]
        new = rows.diff()
        cached = metadata.mask_indptr.diff() // new - new
        return torch.nn.functional.pad(cached.cumsum(0), (1, 0)).to(rows.dtype)

    # Windows.

    @contextlib.contextmanager
    def _whole_windows(self) -> Iterator[None]:
        """Around upstream's preparation of decode: its windows have the key that they lack.

        Upstream's number is how far back the first key lies, one less than there are keys.
        """
        back = self.sliding_window_size
        if self.windows and back is not None:
            self.sliding_window_size = back + 1
        try:
            yield
        finally:
            self.sliding_window_size = back

    def _no_window_rows(self, requests: int) -> WindowRows:
        return WindowRows.allocate(requests, self.local_window, self.device)

    def _list_window(self, forward_batch: ForwardBatch, rows: WindowRows) -> None:
        """The last rows that this rank holds of each request of a decode batch, in place."""
        batch = forward_batch.batch_size
        lens = forward_batch.seq_lens[:batch]
        seen = lens.clamp(max=self.window)
        _, _, held = self._dcp_kv_indices(
            forward_batch.req_pool_indices[:batch], seen, rows.indptr, rows.indices, lens - seen
        )
        self.get_num_kv_splits(rows.counts, held.clamp_min(1))

    # Drafts.

    def _update_target_verify_buffers(
        self, plan: Any, bs: int, seq_lens: Tensor, spec_info: Any, req_pool_indices: Tensor
    ) -> None:
        """What a captured verify pass reads, but for which drafts see which."""
        self.qo_indptr[: bs + 1].copy_(self.captured_queries[: bs + 1])
        self._fill_kv_indptr_and_indices(
            plan, bs, seq_lens, req_pool_indices, self.cuda_graph_kv_indices
        )
        self.get_num_kv_splits(self.cuda_graph_num_kv_splits[:bs], self.shard.lens(seq_lens[:bs]))

    def _fill_kv_indptr_and_indices(
        self,
        plan: Any,
        bs: int,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        kv_indices: Tensor,
        kv_indptr: Tensor | None = None,
    ) -> Tensor:
        """For a verify pass, the rows of this rank's cached tokens; upstream's are the slots."""
        kv_indptr, _, _ = self._dcp_kv_indices(
            req_pool_indices[:bs],
            seq_lens[:bs],
            self.kv_indptr if kv_indptr is None else kv_indptr,
            kv_indices,
        )
        return kv_indptr

    def _masks(self, requests: int, drafts: int) -> Tensor:
        """[B+1]: where the mask of each request's drafts begins."""
        return torch.arange(requests + 1, device=self.device) * drafts**2

    def _show_drafts(self, counts: Tensor, masks: Tensor) -> None:
        """Complete upstream's metadata of a verify pass: splits, and masks of the drafts alone."""
        metadata = self.forward_metadata
        self.prefixes = metadata.qo_indptr, metadata.kv_indptr
        metadata.num_kv_splits, metadata.mask_indptr = counts, masks
        metadata.custom_mask = self.visible.view(torch.uint8).flatten()
