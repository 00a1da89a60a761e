"""Adapters for FlashAttention 3 and 4. Extends `layers/attention/flashattention_backend.py`.

The kernels give a natural LSE, [heads, T] (version 4 beside MLA's two-part queries [T, heads]), and
0 with -inf to a request without tokens. Decode reads this rank's pages by lengths of its own, with
a page table as wide as a rank needs, since from the width follows how finely the kernel splits.
Scales of a quantized cache are inside the LSE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.attention.flash_attention import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.mem_cache.layout.paged_view import paged_view
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_helix.srt.layers.attention.adapters import record_of
from sglang_helix.srt.layers.attention.local_pages import LocalPages
from sglang_helix.srt.layers.attention.sharded import mla_parts
from sglang_helix.srt.layers.attention.sharded_paged import ShardedPagedAttention
from sglang_helix.srt.layers.attention.windows import Tails, windowed
from sglang_helix.srt.layers.dcp.partial import Partial

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class ShardedFlashAttentionBackend(ShardedPagedAttention, FlashAttentionBackend):
    """`fa3` over a sharded cache: GQA, MHA and MLA."""

    upstream_prefill = True
    # A decode step's, int32; None in other passes, for MLA and for version 4.
    schedule: Tensor | None = None
    captured_schedule: Tensor | None = None

    def __init__(self, model_runner: ModelRunner, **kwargs: Any) -> None:
        super().__init__(model_runner, **kwargs)
        self.group_kv_heads: int = model_runner.model_config.get_num_kv_heads(
            get_parallel().attn_tp_size, self.shard.size
        )
        if self.mla and model_runner.kv_cache_dtype != model_runner.dtype:
            # A checkpoint may ask for it too, which start-up does not see.
            raise NotImplementedError(
                f"{record_of(type(self)).name} serves MLA with --dcp-size > 1 from a cache of "
                f"{model_runner.dtype} alone, and this one is of {model_runner.kv_cache_dtype}: "
                "give --kv-cache-dtype bfloat16, or another --attention-backend"
            )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        super().init_forward_metadata(forward_batch)
        decodes = forward_batch.forward_mode.is_decode()
        self.schedule = self._schedule(self.pages, self.cu_q) if decodes else None

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate what captured graphs read; filled anew before every replay."""
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args)
        self.captured_schedule = self._schedule(self.captured_pages, self.captured_cu_q)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Prepare the capture or one replay of a decode graph, in place."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        batch, captured = forward_batch.batch_size, self.captured_schedule
        schedule = self._schedule(self.captured_pages.first(batch), self.captured_cu_q[: batch + 1])
        if captured is not None and schedule is not None:
            captured[: len(schedule)].copy_(schedule)
            schedule = captured[: len(schedule)]
        if in_capture:
            self.schedule = schedule

    def _schedule(self, pages: LocalPages, cu_q: Tensor) -> Tensor | None:
        """How the kernel deals out one query of each request over pages, for GQA by version 3.

        By what the call itself would work it out from: the heads of the group, the lengths, and the
        width of the page table, which bounds the splits. None for drafts, which have several
        queries each.
        """
        if self.mla or self.captured_width > 1 or self._get_scheduler_metadata is None:
            return None
        schedule: Tensor = self._get_scheduler_metadata(
            batch_size=len(pages.lens),
            max_seqlen_q=1,
            max_seqlen_k=pages.table.shape[1] * self.page_size,
            num_heads=self.heads,
            num_heads_k=self.group_kv_heads,
            headdim=self.head_dim,
            cache_seqlens=pages.lens,
            qkv_dtype=self.kv_cache_dtype,
            cu_seqlens_q=cu_q,
            page_size=self.page_size,
            causal=True,
            has_softcap=self.has_softcap,
            num_splits=self.num_splits,
        )
        return schedule

    def _schedule_for(self, layer: RadixAttention, kv_heads: int) -> Tensor | None:
        """The step's schedule; None where the layer is not what it was made for."""
        if windowed(layer):
            return None
        made_for = self.group_kv_heads, self.head_dim, self.head_dim, self.has_softcap
        found = kv_heads, layer.qk_head_dim, layer.v_head_dim, layer.logit_cap > 0
        return self.schedule if found == made_for else None

    def mla_queries(
        self, q: Tensor, q_rope: Tensor, layer: RadixAttention
    ) -> tuple[Tensor, Tensor]:
        """The kernel takes the two parts apart."""
        return mla_parts(q, q_rope, layer)

    def partial_decode(self, q: Any, layer: RadixAttention, forward_batch: ForwardBatch) -> Partial:
        """See `ShardedAttention.partial_decode`."""
        return self._cached(q, layer)

    def partial_current(
        self, q: Any, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial:
        """See `ShardedAttention.partial_current`."""
        if forward_batch.forward_mode.is_target_verify():
            return self._drafts(q, k, v, layer)
        return self._ragged(q, k, v, layer, self.cu_q, self.max_q, causal=True)

    def partial_window(
        self,
        q: Any,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        tails: Tails,
        tail_k: Tensor,
        tail_v: Tensor,
    ) -> Partial:
        """See `ShardedAttention.partial_window`."""
        return self._ragged(
            q,
            tails.before(tail_k, k),
            tails.before(tail_v, v),
            layer,
            tails.cu_keys,
            tails.longest,
            causal=True,
            back=self.window - 1,
        )

    def partial_prefix(
        self,
        q: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        gathered: Tensor | None = None,
    ) -> Partial:
        """See `ShardedAttention.partial_prefix`."""
        if gathered is None:
            return self._cached(q, layer)
        longest, values = (
            max(forward_batch.extend_prefix_lens_cpu),
            gathered[..., : layer.v_head_dim],
        )
        return self._ragged(q, gathered, values, layer, self.cu_prefix, longest, causal=False)

    def _cached(self, q: Any, layer: RadixAttention) -> Partial:
        """Queries over this rank's pages.

        Each sees all tokens of its request; of a window layer, where it has one query, the last.
        """
        window = windowed(layer)
        if self.mla:
            q_v, q = q
            latent = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
            keys = paged_view(latent[..., layer.v_head_dim :], self.page_size)
            values = paged_view(latent[..., : layer.v_head_dim], self.page_size)
            scales = (None, None)
            schedule = None
        else:
            q_v = None
            keys, values = self.get_paged_mha_kv_cache(layer)
            q, _, _, *scales = self.prepare_paged_mha_query(
                q,
                None,
                None,
                layer,
                logical_batch_size=len(self.cu_cached) - 1,
                kv_head_num=keys.shape[2],
                is_prefill=self.max_q > 1,
            )
            schedule = self._schedule_for(layer, keys.shape[2])
        out, lse, *_ = flash_attn_with_kvcache(
            q,
            keys,
            values,
            qv=q_v,
            page_table=self.pages.table,
            cache_seqlens=self.pages.lens,
            cu_seqlens_q=self.cu_cached,
            max_seqlen_q=self.max_q,
            k_descale=scales[0],
            v_descale=scales[1],
            softmax_scale=layer.scaling,
            # One query masks nothing, and has the kernel take the tiles that plain TP has.
            causal=window or schedule is not None,
            window_size=(self.local_window - 1, 0) if window else (-1, -1),
            softcap=layer.logit_cap,
            num_splits=self.num_splits,
            return_softmax_lse=True,
            scheduler_metadata=schedule,
            ver=self.fa_impl_ver,
        )
        return Partial(out, self._by_query(lse, q_v))

    def _ragged(
        self,
        q: Any,
        k: Tensor,
        v: Tensor,
        layer: RadixAttention,
        cu_k: Tensor,
        max_k: int,
        *,
        causal: bool,
        back: int = -1,
    ) -> Partial:
        """The batch's queries over keys and values that stand request after request.

        back: how many keys before its own a query sees, at most; -1: all.
        """
        q_v = None
        if isinstance(q, tuple):
            q_v, q = q
            k = k[..., layer.v_head_dim :]
        out, lse, *_ = flash_attn_varlen_func(
            q,
            k.view(len(k), -1, q.shape[-1]),
            v.view(len(v), -1, layer.v_head_dim),
            self.cu_q,
            cu_k,
            self.max_q,
            max_k,
            qv=q_v,
            softmax_scale=layer.scaling,
            softcap=layer.logit_cap,
            causal=causal,
            window_size=(back, 0) if back > -1 else (-1, -1),
            return_softmax_lse=True,
            ver=self.fa_impl_ver,
        )
        return Partial(out, self._by_query(lse, q_v))

    def _drafts(self, q: Any, k: Tensor, v: Tensor, layer: RadixAttention) -> Partial:
        """Draft tokens over those of their own tree that they see.

        The kernel has no masks: each draft token becomes a request of one query, whose page table
        names the drafts it sees, in pages of one token.
        """
        drafts, visible, q_v = self.max_q, self.visible, None
        if self.mla:
            q_v, q = q
            k = k[..., layer.v_head_dim :]
        # What is seen comes first, in order.
        order = torch.sort((~visible).int(), dim=1, stable=True).indices
        trees = torch.arange(0, len(visible), drafts, device=q.device).repeat_interleave(drafts)
        out, lse, *_ = flash_attn_with_kvcache(
            q,
            k.view(len(k), 1, -1, q.shape[-1]),
            v.view(len(v), 1, -1, layer.v_head_dim),
            qv=q_v,
            page_table=(order + trees[:, None]).int(),
            cache_seqlens=visible.sum(1, dtype=torch.int32),
            cu_seqlens_q=torch.arange(len(q) + 1, dtype=torch.int32, device=q.device),
            max_seqlen_q=1,
            softmax_scale=layer.scaling,
            softcap=layer.logit_cap,
            num_splits=self.num_splits,
            return_softmax_lse=True,
            ver=self.fa_impl_ver,
        )
        return Partial(out, self._by_query(lse, q_v))

    def _by_query(self, lse: Tensor, q_v: Tensor | None) -> Tensor:
        """The LSE as [T, heads]."""
        return lse.T


class ShardedFlashAttention4Backend(ShardedFlashAttentionBackend):
    """`fa4` over a sharded cache: the same interface, other kernels."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner, fa_impl_ver=4)

    def _by_query(self, lse: Tensor, q_v: Tensor | None) -> Tensor:
        return lse.T if q_v is None else lse

    def _drafts(self, q: Any, k: Tensor, v: Tensor, layer: RadixAttention) -> Partial:
        return self.attend_drafts(torch.cat(q, -1) if self.mla else q, k, v, layer)
