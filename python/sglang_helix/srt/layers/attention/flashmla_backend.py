"""Adapter for FlashMLA. Extends `layers/attention/flashmla_backend.py`.

Decode is FlashMLA's kernel with the heads of the whole KVP group over this rank's pages. Prefill is
that of upstream's parent class, FlashInfer's MLA backend, which knows sharded caches: the model
gathers the latent prefix, and this rank attends it with its own heads. Drafts see all of a prefix:
decode's kernel takes them as several queries of a request, without its mask.

The kernels give a natural LSE [B, heads, 1]. A request of which this rank holds no token gets +inf
from the bf16 kernel, which counts as empty; the fp8 kernel would read in front of its page table,
so it is given one row in place of none, and its LSE is overwritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.attention.flash_mla_interface import (
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from sglang.kernels.ops.quantization.fp8_kernel import scaled_fp8_quant
from sglang.srt.layers.attention.flashmla_backend import PAGE_SIZE, FlashMLABackend
from sglang.srt.mem_cache.layout.paged_view import paged_view
from torch import Tensor

from sglang_helix.srt.layers.attention.flashinfer_mla_backend import FlashInferPrefill
from sglang_helix.srt.layers.attention.local_pages import LocalPages
from sglang_helix.srt.layers.attention.sharded_paged import ShardedPagedAttention
from sglang_helix.srt.layers.dcp.partial import Partial

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner


class ShardedFlashMLABackend(FlashInferPrefill, ShardedPagedAttention, FlashMLABackend):
    """`flashmla` over a sharded cache: MLA, in bf16 or fp8, in pages of 64 tokens."""

    def __init__(self, model_runner: ModelRunner, **kwargs: Any) -> None:
        super().__init__(model_runner, **kwargs)
        self.unit_scale = torch.ones(1, dtype=torch.float32, device=self.device)

    def deal(self, pages: LocalPages, cu_q: Tensor, max_q: int) -> tuple[Tensor, Tensor, Tensor]:
        """Programs [P, 8], splits [B + 1], and lengths [B] that the kernel is to see, all int32.

        P follows from heads and device alone.
        """
        lens = pages.lens.clamp_min(1) if self.is_fp8_kvcache else pages.lens
        programs, splits = get_mla_metadata(
            lens, max_q * self.heads, 1, is_fp8_kvcache=self.is_fp8_kvcache
        )
        return programs, splits, lens

    def attend_pages(self, q: Tensor, layer: RadixAttention) -> Partial:
        """See `ShardedPagedAttention.attend_pages`."""
        assert self.schedule is not None
        programs, splits, lens = self.schedule
        queries, scales = q.unflatten(0, (-1, self.max_q)), {}
        if self.is_fp8_kvcache:
            scale = self.unit_scale if layer.k_scale is None else layer.k_scale.reshape(1)
            quantized, _ = scaled_fp8_quant(q.reshape(-1, q.shape[-1]), scale)
            queries = quantized.view(queries.shape)
            scales = {"descale_q": scale, "descale_k": scale}
        out, lse = flash_mla_with_kvcache(
            q=queries,
            k_cache=paged_view(self.token_to_kv_pool.get_key_buffer(layer.layer_id), PAGE_SIZE),
            block_table=self.pages.table,
            cache_seqlens=lens,
            head_dim_v=self.kv_lora_rank,
            tile_scheduler_metadata=programs,
            num_splits=splits,
            softmax_scale=layer.scaling,
            # One query masks nothing.
            causal=self.max_q == 1,
            **scales,
        )
        lse = lse.mT  # [B, queries, heads]
        if self.is_fp8_kvcache:
            lse = lse.masked_fill(self.pages.empty[:, None, None], -torch.inf)
        return Partial(out.flatten(0, 1), lse.flatten(0, 1))
