"""Adapter for SGLang's Triton attention backend. Extends `layers/attention/triton_backend.py`.

What the kernels read of a batch: `triton_rows.py`. Of upstream's kernels the adapter calls the
first decode stage, which leaves one partial result per split of the sequence, and the extend kernel
with its LSE output. The splits are partial attentions like those of other ranks, so the project's
own combine, or the exchange itself, replaces upstream's second stage and its separate LSE
reduction. Drafts see all of a prefix, and so decode it too, as more heads of their request: the
extend kernel walks it in one program.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.triton_backend import logit_capping_mod
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_helix.helix import SeriesError
from sglang_helix.srt.layers.attention.decode_attention import first_stage
from sglang_helix.srt.layers.attention.drafts import Drafted
from sglang_helix.srt.layers.attention.kv_splits import BLOCK
from sglang_helix.srt.layers.attention.triton_rows import ShardedTritonRows
from sglang_helix.srt.layers.attention.windows import Tails, windowed
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits, merge
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class ShardedTritonAttnBackend(ShardedTritonRows):
    """`triton` over a sharded cache: GQA, MHA and absorbed MLA."""

    dcp_size: int

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
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
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
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
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

    def partial_prefix(
        self,
        q: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        gathered: Tensor | None = None,
    ) -> Partial | Drafted:
        """See `ShardedAttention.partial_prefix`."""
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        tile, verify = self.scratch.plan.tile, forward_batch.forward_mode.is_target_verify()
        if verify and tile.fits(q.shape[1] * self.drafts, keys.shape[1]):
            decode = partial(self.partial_decode, layer=layer, forward_batch=forward_batch)
            return self.as_heads(decode, q, keys.shape[1])
        indices = self.forward_metadata.kv_indices
        if gathered is not None:
            keys, values, indices = gathered, gathered[..., : layer.v_head_dim], None
        none = q.new_empty((0, keys.shape[1], layer.qk_head_dim))
        no_values = none[..., : layer.v_head_dim]
        return self._extend(
            *(q, layer, none, no_values, keys, values, indices, self.prefixes, _scales(layer))
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
            prefixes = metadata.qo_indptr, self.mask_columns_before()
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
