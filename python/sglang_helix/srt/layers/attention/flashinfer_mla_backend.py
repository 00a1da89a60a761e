"""What FlashInfer's MLA lacks. Extends `layers/attention/flashinfer_mla_backend.py`.

A verify pass over this rank's rows with an LSE: upstream's reads all of a request's slots. Drafts
see all of a prefix, which is planned without a mask, with the heads of the whole KVP group.

A plan of a captured decode that waits for the copy of the last one. And natural LSEs of the
prefill in chunks: SGLang's model merges them as such. FlashInfer's kernels return them to the base
of 2, so the merge would weigh every chunk wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention import flashinfer_mla_backend as upstream
from torch import Tensor

from sglang_helix.srt.layers.attention.flashinfer_plans import lens_on_host, planned
from sglang_helix.srt.layers.attention.prefixes import summed_on_host
from sglang_helix.srt.layers.attention.sharded import ShardedAttention, mla_parts
from sglang_helix.srt.layers.dcp.partial import Partial

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class FlashInferPrefill(ShardedAttention):
    """In front of FlashInfer's backend of MLA, or of one that prefills by it: all but drafts."""

    upstream_prefill = True

    def forward_extend(
        self,
        q: Tensor,
        k: Any,
        v: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upstream's, absorbed and un-absorbed: [T, own heads * Dv], or with its LSE.

        Of drafts, see `ShardedAttention.forward_extend`.
        """
        self._own_sinks(sinks)  # none: MLA's are refused
        if forward_batch.forward_mode.is_target_verify():
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return upstream.FlashInferMLAAttnBackend.forward_extend(
            self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs
        )

    def partial_current(
        self, q: Any, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial:
        """See `ShardedAttention.partial_current`; of drafts, the others are upstream's."""
        return self.attend_drafts(q, k, v, layer)


class ShardedFlashInferMLAAttnBackend(FlashInferPrefill, upstream.FlashInferMLAAttnBackend):
    """`flashinfer` of MLA beside drafts: their verify pass; all else is upstream's."""

    forward_decode = upstream.FlashInferMLAAttnBackend.forward_decode

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        if not forward_batch.forward_mode.is_target_verify():
            super().init_forward_metadata(forward_batch)
            return
        self.prepare_drafts(forward_batch)
        self._plan_prefix(self.prefill_wrapper_verify, forward_batch)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Prepare the capture or one replay of a graph, in place."""
        if not forward_batch.forward_mode.is_target_verify():
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            return
        self.prepare_captured_drafts(forward_batch, in_capture)
        batch = forward_batch.batch_size
        if in_capture:
            self.prefill_cuda_graph_metadata[batch] = upstream.BatchMLAPagedAttentionWrapper(
                self.workspace_buffer,
                use_cuda_graph=True,
                qo_indptr=self.cuda_graph_qo_indptr[: batch + 1],
                kv_indptr=self.cuda_graph_kv_indptr[: batch + 1],
                kv_indices=self.cuda_graph_kv_indices,
                kv_len_arr=self.cuda_graph_kv_lens[:batch],
                backend="auto",
            )
        self._plan_prefix(
            self.prefill_cuda_graph_metadata[batch], forward_batch, self.cuda_graph_kv_indices
        )

    def _plan_prefix(
        self, wrapper: Any, forward_batch: ForwardBatch, out: Tensor | None = None
    ) -> None:
        """The drafts over this rank's cached tokens, whose rows are left in out."""
        batch, updater = forward_batch.batch_size, self.indices_updater_prefill
        held, rows = self.held_rows(
            forward_batch.req_pool_indices[:batch],
            forward_batch.seq_lens[:batch],
            lens_on_host(forward_batch),
            self.kv_indptr,
            out,
        )
        with planned(wrapper, rows.device.type):
            wrapper.plan(
                qo_indptr=summed_on_host([self.drafts] * batch),
                kv_indptr=summed_on_host(held),
                kv_indices=rows,
                kv_len_arr=torch.tensor(held, dtype=torch.int32),
                num_heads=self.heads,
                head_dim_ckv=updater.kv_lora_rank,
                head_dim_kpe=updater.qk_rope_head_dim,
                page_size=1,
                causal=False,
                sm_scale=updater.scaling,
                q_data_type=updater.q_data_type,
                kv_data_type=updater.data_type,
            )
        self.forward_metadata = upstream.PrefillMetadata(wrapper, False)

    def mla_queries(
        self, q: Tensor, q_rope: Tensor, layer: RadixAttention
    ) -> tuple[Tensor, Tensor]:
        """The kernel takes the two parts apart."""
        return mla_parts(q, q_rope, layer)

    def partial_prefix(
        self,
        q: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        gathered: Tensor | None = None,
    ) -> Partial:
        """See `ShardedAttention.partial_prefix`; of drafts, the others are upstream's."""
        queries, rope = q
        latent = self.token_to_kv_pool.get_key_buffer(layer.layer_id).to(queries.dtype)
        width = layer.v_head_dim
        out, lse = self.forward_metadata.prefill_wrapper.run(
            queries, rope, latent[..., :width], latent[..., width:], return_lse=True
        )
        return Partial(out, lse)


def plan_behind_the_last(
    original: Callable[..., None],
    self: Any,
    qo_indptr_cpu: Tensor,
    kv_indptr_cpu: Tensor,
    kv_indices: Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Around a replay's plan of decode, made of lengths on the host: see `planned`."""
    with planned(self, kv_indices.device.type):
        original(self, qo_indptr_cpu, kv_indptr_cpu, kv_indices, *args, **kwargs)


def natural_lse(result: Any, *args: Any, **kwargs: Any) -> Any:
    """After a prefill kernel: (out, LSE) with a natural LSE, or out alone where none was asked."""
    if not isinstance(result, tuple):
        return result
    out, lse = result
    return out, lse * math.log(2)
