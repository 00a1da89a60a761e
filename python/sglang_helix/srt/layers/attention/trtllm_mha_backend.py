"""Adapter for TensorRT-LLM's attention. Extends `layers/attention/trtllm_mha_backend.py`.

Decode is the kernel of trtllm-gen over this rank's pages, which returns a base-2 LSE [T, heads];
chunks, drafts and their cached prefix are FlashInfer's, as upstream's backend derives from that
one. What the kernel leaves for a request without tokens is not documented: it is given one token of
some page, and what is said of it beside the LSEs is that it has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flashinfer.decode
import torch
from sglang.kernels.ops.attention.utils import canonicalize_stride
from sglang.srt.layers.attention.trtllm_mla_backend import (
    make_persistent_multi_ctas_kv_counter_buffer,
)
from sglang.srt.mem_cache.layout.paged_view import paged_kv_view
from sglang.srt.runtime_context import get_buffer
from torch import Tensor

from sglang_helix.srt.layers.attention.flashinfer_backend import ShardedFlashInferAttnBackend
from sglang_helix.srt.layers.attention.local_pages import LocalPages
from sglang_helix.srt.layers.dcp.partial import Masked

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class ShardedTRTLLMHAAttnBackend(ShardedFlashInferAttnBackend):
    """`trtllm_mha` over a sharded cache: GQA and MHA."""

    pages: LocalPages
    read_lens: Tensor

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        # The kernel counts in it, and wants it zero; upstream's backend has it under this name.
        self.zeroed_workspace = get_buffer(
            "trtllm_mha_zero_workspace",
            lambda: torch.zeros_like(self.workspace_buffer),
        )
        self.counters = make_persistent_multi_ctas_kv_counter_buffer(
            torch.device(self.device),
            num_q_heads=self.heads,
            max_batch_size=model_runner.max_running_requests + 1,
        )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        if not forward_batch.forward_mode.is_decode_or_idle():
            super().init_forward_metadata(forward_batch)
            return
        self.prepare_writes(forward_batch)
        pages = self.allocate_pages(forward_batch.batch_size, self.max_context_len)
        self._read(pages, forward_batch)

    def _read(self, pages: LocalPages, forward_batch: ForwardBatch) -> None:
        """Fill the pages that decode reads, and the lengths: a request without tokens has one."""
        self.fill_pages(pages, forward_batch.req_pool_indices, forward_batch.seq_lens)
        self.pages, self.read_lens = pages, pages.lens.clamp(min=1)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate what captured graphs read; filled anew in every replay."""
        self.allocate_captured_writes(max_num_tokens)
        self.allocate_captured_drafts(max_bs, max_num_tokens)
        self.captured_pages = self.allocate_pages(max_bs, self.max_context_len)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Nothing: see `init_forward_metadata_in_graph`."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Record what a decode graph prepares for itself, of the batch's captured tensors."""
        self.prepare_captured_writes(forward_batch)
        self._read(self.captured_pages.first(forward_batch.batch_size), forward_batch)

    def partial_decode(
        self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Masked:
        """See `ShardedAttention.partial_decode`."""
        keys, values = (
            canonicalize_stride(
                paged_kv_view(
                    part, self.pool_page_size, self.group_kv_heads, self.head_dim
                ).permute(0, 2, 1, 3)
            )
            for part in self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        )
        k_scale, v_scale = 1.0, 1.0
        if keys.dtype == torch.float8_e4m3fn:
            # The kernel multiplies in one dtype; the queries' own scale is 1.
            q = q.to(keys.dtype)
            k_scale, v_scale = layer.k_scale_float or 1.0, layer.v_scale_float or 1.0
        out, lse = flashinfer.decode.trtllm_batch_decode_with_kv_cache(
            query=q.contiguous(),
            kv_cache=(keys, values),
            workspace_buffer=self.zeroed_workspace,
            block_tables=self.pages.table,
            seq_lens=self.read_lens,
            max_seq_len=self.pages.table.shape[1] * self.pool_page_size,
            bmm1_scale=layer.scaling * k_scale,
            bmm2_scale=v_scale,
            out_dtype=self.q_dtype,
            backend="trtllm-gen",
            return_lse=True,
            multi_ctas_kv_counter_buffer=self.counters,
        )
        return Masked(out, lse, self.pages.empty)
