"""Adapter for SGLang's Triton attention backend. Extends `layers/attention/triton_backend.py`.

Upstream already builds each rank's index lists, for eager batches and for captured graphs. Of its
kernels the adapter calls the first decode stage, which leaves one partial result per split of the
sequence, and the extend kernel with its LSE output. The splits are partial attentions like those
of other ranks, so the project's own combine, or the exchange itself, replaces upstream's second
stage and its separate LSE reduction. Drafts see all of a prefix, and so decode it too, as more
heads of their request: the extend kernel walks it in one program.

Window layers with a pool of their own decode by the same kernel over upstream's list of the rows in
their window, which leaves out one key: W - 1 of them where all other kernels, and the models, see
W. Here it has W. Other window layers have a list of the W / K rows that this rank holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend, logit_capping_mod
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_helix.helix import SeriesError
from sglang_helix.srt.layers.attention.decode_attention import first_stage
from sglang_helix.srt.layers.attention.drafts import Drafted
from sglang_helix.srt.layers.attention.kv_splits import BLOCK, Scratch
from sglang_helix.srt.layers.attention.prefixes import prefixed, summed
from sglang_helix.srt.layers.attention.sharded import ShardedAttention
from sglang_helix.srt.layers.attention.windows import Tails, window_of, windowed
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits, merge
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class ShardedTritonAttnBackend(ShardedAttention, TritonAttnBackend):
    """`triton` over a sharded cache: GQA, MHA and absorbed MLA."""

    dcp_size: int
    sliding_window_size: int | None
    prefixes: tuple[Tensor, Tensor]  # of an extend, see `_prefixes`
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
                self.window_rows = self._new_window_rows(forward_batch.batch_size)
                self._list_window(forward_batch, self.window_rows)
            return
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            counts = torch.empty(forward_batch.batch_size, dtype=torch.int32, device=self.device)
            self.get_num_kv_splits(counts, self.shard.lens(forward_batch.seq_lens))
            self._show_drafts(counts, self._masks(forward_batch.batch_size, self.drafts))
        else:
            self.prefixes = self._prefixes(forward_batch)

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

    def _new_window_rows(self, batch: int) -> WindowRows:
        return WindowRows(
            torch.zeros(batch + 1, dtype=torch.int32, device=self.device),
            torch.zeros(batch * self.local_window, dtype=torch.int64, device=self.device),
            torch.zeros(batch, dtype=torch.int32, device=self.device),
        )

    def _list_window(self, forward_batch: ForwardBatch, rows: WindowRows) -> None:
        """The last rows that this rank holds of each request of a decode batch, in place."""
        batch = forward_batch.batch_size
        lens = forward_batch.seq_lens[:batch]
        seen = lens.clamp(max=self.window)
        _, _, held = self._dcp_kv_indices(
            forward_batch.req_pool_indices[:batch], seen, rows.indptr, rows.indices, lens - seen
        )
        self.get_num_kv_splits(rows.counts, held.clamp_min(1))

    def _masks(self, requests: int, drafts: int) -> Tensor:
        """[B+1]: where the mask of each request's drafts begins."""
        return torch.arange(requests + 1, device=self.device) * drafts**2

    def _show_drafts(self, counts: Tensor, masks: Tensor) -> None:
        """Complete upstream's metadata of a verify pass: splits, and masks of the drafts alone."""
        metadata = self.forward_metadata
        metadata.num_kv_splits, metadata.mask_indptr = counts, masks
        metadata.custom_mask = self.visible.view(torch.uint8).flatten()

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

    def _update_target_verify_buffers(
        self, plan: Any, bs: int, seq_lens: Tensor, spec_info: Any, req_pool_indices: Tensor
    ) -> None:
        """What a captured verify pass reads, but for which drafts see which."""
        self.qo_indptr[: bs + 1].copy_(self.captured_queries[: bs + 1])
        self._fill_kv_indptr_and_indices(
            plan, bs, seq_lens, req_pool_indices, self.cuda_graph_kv_indices
        )
        self.get_num_kv_splits(self.cuda_graph_num_kv_splits[:bs], self.shard.lens(seq_lens[:bs]))

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

    def get_num_kv_splits(
        self, num_kv_splits: Tensor, seq_lens: Tensor, uneven_batch: Tensor | None = None
    ) -> None:
        """Splits of each request of a decode batch, from its local length."""
        self.scratch.plan.count(seq_lens, num_kv_splits)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate what captured graphs read; filled anew before every replay."""
        # Without splits and rows of its own, which upstream sizes by the longest context.
        super().init_cuda_graph_state(max_bs, max_num_tokens, self.scratch.indices, *args[1:])
        self.captured_masks = self._masks(max_bs, self.captured_width)
        self.captured_queries = self.captured_masks // self.captured_width
        if self.window:
            self.captured_window_rows = self._new_window_rows(max_bs)
        if self.windows and self.sliding_window_size is not None:
            # Upstream has as much for windows as for a rank's share of the context.
            self.cuda_graph_window_kv_indices = torch.zeros(
                max_num_tokens * (self.sliding_window_size + 1),
                dtype=torch.int64,
                device=self.device,
            )

    def partial_decode(
        self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Splits:
        """See `ShardedAttention.partial_decode`."""
        if windowed(layer):
            return self._decode(q, layer, *self.window_rows)
        metadata = self.forward_metadata
        return self._decode(
            q, layer, metadata.kv_indptr, metadata.kv_indices, metadata.num_kv_splits
        )

    def _decode(
        self, q: Tensor, layer: RadixAttention, indptr: Tensor, indices: Tensor, counts: Tensor
    ) -> Splits:
        """One query per request, q [B, heads, Dk], over the listed rows of the layer's pool."""
        keys, values = self._buffers(layer)
        k_scale, v_scale = _scales(layer)
        # Splits were counted for a batch of this size.
        assert len(q) == len(indptr) - 1
        out, lse = self.scratch.of(len(q), q.shape[1], layer.v_head_dim)
        first_stage(
            q,
            keys,
            values,
            out,
            lse,
            indptr,
            indices,
            counts,
            layer.scaling * k_scale,
            logit_capping_mod(layer.logit_capping_method, layer.logit_cap),
            layer.xai_temperature_len,
            self.use_mla,
            self.scratch.plan.tile,
        )
        return Splits(out, lse, indptr, counts, BLOCK, v_scale)

    def attend_window(
        self,
        q: Tensor,
        k: Any,
        v: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `ShardedAttention.attend_window`."""
        if not forward_batch.forward_mode.is_decode_or_idle():
            # Nothing of the layer is sharded, as where there is no DCP.
            size, self.dcp_size = self.dcp_size, 1
            try:
                return super().attend_window(q, k, v, layer, forward_batch, save_kv_cache, sinks)
            finally:
                self.dcp_size = size
        metadata = self.forward_metadata
        if save_kv_cache:
            loc = KVWriteLoc.for_batch(forward_batch, swa_loc=metadata.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)
        splits = self._decode(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            layer,
            metadata.window_kv_indptr,
            metadata.window_kv_indices,
            metadata.window_num_kv_splits,
        )
        whole = combine_splits(splits, q.dtype if sinks is None else torch.float32)
        return merge(whole, None, out_dtype=q.dtype, sinks=sinks).flatten(1)

    def partial_current(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial:
        """See `ShardedAttention.partial_current`."""
        keys, values = self._buffers(layer)
        return self._extend(q, layer, k, v, keys, values, None, None, (1.0, 1.0))

    def partial_window(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        tails: Tails,
        tail_k: Tensor,
        tail_v: Tensor,
    ) -> Partial:
        """See `ShardedAttention.partial_window`."""
        return self._extend(
            *(q, layer, k, v, tail_k, tail_v, None),
            (self.forward_metadata.qo_indptr, tails.cu_tails),
            (1.0, 1.0),
            back=self.window - 1,
        )

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

    def partial_prefix(
        self,
        q: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        gathered: Tensor | None = None,
    ) -> Partial | Drafted:
        """See `ShardedAttention.partial_prefix`."""
        metadata = self.forward_metadata
        prefixes: tuple[Tensor, Tensor] | None = None
        keys, values = self._buffers(layer)
        if forward_batch.forward_mode.is_target_verify():
            if self.scratch.plan.tile.fits(q.shape[1] * self.drafts, keys.shape[1]):
                decode = partial(self.partial_decode, layer=layer, forward_batch=forward_batch)
                return self.as_heads(decode, q, keys.shape[1])
            prefixes = metadata.qo_indptr, metadata.kv_indptr
        if gathered is None:
            indices = metadata.kv_indices
        else:
            keys, values = gathered, gathered[..., : layer.v_head_dim]
            indices = None
        none = q.new_empty((0, keys.shape[1], layer.qk_head_dim))
        return self._extend(
            q,
            layer,
            none,
            none[..., : layer.v_head_dim],
            keys,
            values,
            indices,
            prefixes or self.prefixes,
            _scales(layer),
        )

    def _extend(
        self,
        q: Tensor,
        layer: RadixAttention,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        indices: Tensor | None,
        prefixes: tuple[Tensor, Tensor] | None,
        scales: tuple[float, float],
        back: int = -1,
    ) -> Partial:
        """Upstream's extend kernel over the current chunk (prefixes None) or over cached rows.

        indices: which rows of keys and values; None where a prefix lies there in order. back: how
        many keys before its own a query sees, of cached rows and chunk together; -1: all of one.
        """
        metadata = self.forward_metadata
        current, window = prefixes is None, back > -1
        mask = metadata.custom_mask if current else None
        if prefixes is None:
            prefixes = metadata.qo_indptr, self._mask_columns_before(metadata)
        # The kernel writes every row of a request; of padded ones nobody reads what is there.
        out = q.new_empty((*q.shape[:2], layer.v_head_dim))
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        self.extend_attention_fwd(
            _in_rows(q),
            _in_rows(k),
            _in_rows(v),
            out,
            keys,
            values,
            *prefixes,
            metadata.kv_indices if indices is None else indices,
            mask,
            current or window,
            metadata.mask_indptr if mask is not None else None,
            metadata.max_extend_len,
            *scales,
            sm_scale=layer.scaling,
            logit_cap=logit_capping_mod(layer.logit_capping_method, layer.logit_cap),
            xai_temperature_len=layer.xai_temperature_len,
            lse_extend=lse,
            skip_prefix=current,
            skip_extend=not (current or window),
            sliding_window_size=back,
            identity_kv_indices=indices is None,
        )
        return Partial(out, lse)

    def _mask_columns_before(self, metadata: Any) -> Tensor:
        """Where the chunk's own columns of each request's mask start, summed up as an indptr.

        A chunk with pictures (Gemma-4) brings a mask, a row per token, that begins with the cached
        tokens; the kernel finds the rest of them by the number of cached tokens. Masks of drafts
        are of them alone, and other chunks have none.
        """
        rows = metadata.qo_indptr
        if metadata.custom_mask is None or metadata.num_kv_splits is not None:
            return self.nothing_before[: len(rows)]
        new = rows.diff()
        cached = metadata.mask_indptr.diff() // new - new
        return torch.nn.functional.pad(cached.cumsum(0), (1, 0)).to(rows.dtype)

    def _buffers(self, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)


class WindowRows(NamedTuple):
    """Rows of windows cut by owner, of a decode batch of B requests; graphs read them in place.

    indptr [B+1] int32; indices int64, one request after the other; counts [B] int32 of splits.
    """

    indptr: Tensor
    indices: Tensor
    counts: Tensor

    def first(self, requests: int) -> WindowRows:
        """The same memory, for the first so many requests."""
        return WindowRows(self.indptr[: requests + 1], self.indices, self.counts[:requests])


def draft_pages(result: None, backend: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """After `TritonMultiStepDraftBackend.__init__`: trees of drafts lie in the allocator's pages.

    Upstream lays their slots out by these, K times as long, and reads them by `--page-size`.

    Raises SeriesError outside of the draft's scope, where the steps would read rows by owner.
    """
    if get_parallel().attn_dcp_size > 1:
        raise SeriesError("a draft's attention was built outside draft_tp_context")
    backend.page_size = model_runner.token_to_kv_pool_allocator.page_size


def _in_rows(x: Tensor) -> Tensor:
    """As the extend kernel takes it: any strides of tokens and heads."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scales(layer: RadixAttention) -> tuple[float, float]:
    """Scales of a quantized cache, key and value; 1 where it has none."""
    if layer.k_scale is None or layer.v_scale is None:
        return 1.0, 1.0
    return layer.k_scale_float, layer.v_scale_float
