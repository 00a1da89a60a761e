"""Adapter for SGLang's Triton attention backend. Extends `layers/attention/triton_backend.py`.

Upstream already builds each rank's index lists, for eager batches and for captured graphs. Of its
kernels the adapter calls the first decode stage, which leaves one partial result per split of the
sequence, and the extend kernel with its LSE output. The splits are partial attentions like those
of other ranks, so the project's own combine, or the exchange itself, replaces upstream's second
stage and its separate LSE reduction.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.attention.decode_attention import (
    _MIN_BLOCK_KV,
    _decode_att_m_fwd,
    _decode_grouped_att_m_fwd,
)
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend, logit_capping_mod
from torch import Tensor

from sglang_helix.srt.layers.attention.sharded import ShardedAttention
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class ShardedTritonAttnBackend(ShardedAttention, TritonAttnBackend):
    """`triton` over a sharded cache: GQA, MHA and absorbed MLA."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        super().init_forward_metadata(forward_batch)
        if (lse := self.forward_metadata.attn_lse) is not None:
            # The kernel writes only the splits a request has, the same ones in every layer.
            lse.fill_(-torch.inf)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Prepare the capture or one replay of a decode graph, in place."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self.cuda_graph_attn_lse[: forward_batch.batch_size].fill_(-torch.inf)

    def partial_decode(
        self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Splits:
        """See `ShardedAttention.partial_decode`."""
        metadata = self.forward_metadata
        keys, values = self._buffers(layer)
        heads, kv_heads = q.shape[1], keys.shape[1]
        k_scale, v_scale = _scales(layer)
        if heads == kv_heads:
            stage1 = _decode_att_m_fwd
        else:
            stage1 = functools.partial(_decode_grouped_att_m_fwd, has_mla=self.use_mla)
        logits, lse = metadata.attn_logits[: len(q)], metadata.attn_lse[: len(q)]
        stage1(
            q,
            keys,
            values,
            logits,
            lse,
            metadata.kv_indptr,
            metadata.kv_indices,
            metadata.num_kv_splits,
            self.max_kv_splits,
            layer.scaling * k_scale,
            logit_capping_mod(layer.logit_capping_method, layer.logit_cap),
            xai_temperature_len=layer.xai_temperature_len,
        )
        return Splits(
            logits, lse, metadata.kv_indptr, metadata.num_kv_splits, _MIN_BLOCK_KV, v_scale
        )

    def partial_current(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial:
        """See `ShardedAttention.partial_current`."""
        keys, values = self._buffers(layer)
        return self._extend(
            q, layer, k, v, keys, values, self.forward_metadata.kv_indices[:0], None, (1.0, 1.0)
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
    ) -> Partial:
        """See `ShardedAttention.partial_prefix`."""
        if gathered is None:
            keys, values = self._buffers(layer)
            indices, indptr = self.forward_metadata.kv_indices, self.forward_metadata.kv_indptr
        else:
            keys, values = gathered, gathered[..., : layer.v_head_dim]
            indices = torch.arange(len(gathered), device=q.device)
            indptr = torch.zeros_like(self.forward_metadata.qo_indptr)
            indptr[1:] = forward_batch.extend_prefix_lens.cumsum(0)
        none = q.new_empty((0, keys.shape[1], layer.qk_head_dim))
        return self._extend(
            q,
            layer,
            none,
            none[..., : layer.v_head_dim],
            keys,
            values,
            indices,
            indptr,
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
        indices: Tensor,
        indptr: Tensor | None,
        scales: tuple[float, float],
    ) -> Partial:
        """Upstream's extend kernel over the current chunk (indptr None) or over cached rows."""
        metadata = self.forward_metadata
        current = indptr is None
        mask = metadata.custom_mask if current else None
        if indptr is None:
            indptr = self._mask_columns_before(metadata)
        out = q.new_zeros((*q.shape[:2], layer.v_head_dim), dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        self.extend_attention_fwd(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            out,
            keys,
            values,
            metadata.qo_indptr,
            indptr,
            indices,
            mask,
            current,
            metadata.mask_indptr if mask is not None else None,
            metadata.max_extend_len,
            *scales,
            sm_scale=layer.scaling,
            logit_cap=logit_capping_mod(layer.logit_capping_method, layer.logit_cap),
            xai_temperature_len=layer.xai_temperature_len,
            lse_extend=lse,
            skip_prefix=current,
            skip_extend=not current,
        )
        return out, lse

    @staticmethod
    def _mask_columns_before(metadata: Any) -> Tensor:
        """Where the chunk's own columns of each request's mask start, summed up as an indptr.

        A tree of draft tokens brings a mask, a row per draft, that begins with the cached tokens;
        the kernel finds the rest of them by the number of cached tokens. A chunk has no mask.
        """
        drafts = metadata.qo_indptr
        if metadata.custom_mask is None:
            return torch.zeros_like(drafts)
        return (metadata.mask_indptr // metadata.max_extend_len - drafts).to(drafts.dtype)

    def _buffers(self, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)


def _scales(layer: RadixAttention) -> tuple[float, float]:
    """Scales of a quantized cache, key and value; 1 where it has none."""
    if layer.k_scale is None or layer.v_scale is None:
        return 1.0, 1.0
    return layer.k_scale_float, layer.v_scale_float
