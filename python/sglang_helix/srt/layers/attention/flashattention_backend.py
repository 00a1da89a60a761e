"""Adapters for FlashAttention 3 and 4. Extends `layers/attention/flashattention_backend.py`.

The kernels give a natural LSE, [heads, T] (version 4 beside MLA's two-part queries [T, heads]), and
0 with -inf to a request without tokens. Decode reads this rank's pages by lengths of its own, with
a page table as wide as a rank needs, since from the width follows how finely the kernel splits.
Scales of a quantized cache are inside the LSE.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def __init__(self, model_runner: ModelRunner, **kwargs: Any) -> None:
        super().__init__(model_runner, **kwargs)
        self.group_kv_heads: int = model_runner.model_config.get_num_kv_heads(
            get_parallel().attn_tp_size, self.shard.size
        )

    def deal(self, pages: LocalPages, cu_q: Tensor, max_q: int) -> tuple[Tensor] | None:
        """Of one query of each request, for GQA by version 3: one int32 tensor.

        By what the call itself would work it out from: the heads of the group, the lengths, and the
        width of the page table, which bounds the splits. None for drafts, which have several
        queries each.
        """
        drafts = max(max_q, self.captured_width) > 1
        if self.mla or drafts or self._get_scheduler_metadata is None:
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
        return (schedule,)

    def _schedule_for(self, layer: RadixAttention, kv_heads: int) -> Tensor | None:
        """The step's schedule; None where the layer is not what it was made for."""
        if windowed(layer):
            return None
        made_for = self.group_kv_heads, self.head_dim, self.head_dim, self.has_softcap
        found = kv_heads, layer.qk_head_dim, layer.v_head_dim, layer.logit_cap > 0
        return self.schedule[0] if self.schedule and found == made_for else None

    def mla_queries(
        self, q: Tensor, q_rope: Tensor, layer: RadixAttention
    ) -> tuple[Tensor, Tensor]:
        """The kernel takes the two parts apart."""
        return mla_parts(q, q_rope, layer)

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
            return super().partial_prefix(q, layer, forward_batch)
        longest = max(forward_batch.extend_prefix_lens_cpu)
        values = gathered[..., : layer.v_head_dim]
        return self._ragged(q, gathered, values, layer, self.cu_prefix, longest, causal=False)

    def attend_pages(self, q: Any, layer: RadixAttention) -> Partial:
        """See `ShardedPagedAttention.attend_pages`."""
        window = windowed(layer)
        if self.mla:
            latent = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
            keys = paged_view(latent[..., layer.v_head_dim :], self.page_size)
            values = paged_view(latent[..., : layer.v_head_dim], self.page_size)
            scales = (None, None)
            schedule = None
        else:
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
        return self._attended(
            flash_attn_with_kvcache,
            layer,
            q,
            keys,
            values,
            page_table=self.pages.table,
            cache_seqlens=self.pages.lens,
            cu_seqlens_q=self.cu_cached,
            max_seqlen_q=self.max_q,
            k_descale=scales[0],
            v_descale=scales[1],
            # One query masks nothing, and has the kernel take the tiles that plain TP has.
            causal=window or schedule is not None,
            window_size=(self.local_window - 1, 0) if window else (-1, -1),
            num_splits=self.num_splits,
            scheduler_metadata=schedule,
        )

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
        return self._attended(
            flash_attn_varlen_func,
            layer,
            q,
            *_by_head(q, k, v, layer),
            self.cu_q,
            cu_k,
            self.max_q,
            max_k,
            causal=causal,
            window_size=(back, 0) if back > -1 else (-1, -1),
        )

    def _drafts(self, q: Any, k: Tensor, v: Tensor, layer: RadixAttention) -> Partial:
        """Draft tokens over those of their own tree that they see.

        The kernel has no masks: each draft token becomes a request of one query, whose page table
        names the drafts it sees, in pages of one token.
        """
        drafts, visible = self.max_q, self.visible
        # What is seen comes first, in order.
        order = torch.sort((~visible).int(), dim=1, stable=True).indices
        trees = torch.arange(0, len(visible), drafts, device=k.device).repeat_interleave(drafts)
        keys, values = _by_head(q, k, v, layer)
        return self._attended(
            flash_attn_with_kvcache,
            layer,
            q,
            keys[:, None],
            values[:, None],
            page_table=(order + trees[:, None]).int(),
            cache_seqlens=visible.sum(1, dtype=torch.int32),
            cu_seqlens_q=torch.arange(len(k) + 1, dtype=torch.int32, device=k.device),
            max_seqlen_q=1,
            num_splits=self.num_splits,
        )

    def _attended(
        self,
        kernel: Callable[..., Any],
        layer: RadixAttention,
        q: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Partial:
        """What a kernel makes of queries, or of MLA's two parts of them."""
        q_v, q = q if isinstance(q, tuple) else (None, q)
        out, lse, *_ = kernel(
            q,
            *args,
            qv=q_v,
            softmax_scale=layer.scaling,
            softcap=layer.logit_cap,
            return_softmax_lse=True,
            ver=self.fa_impl_ver,
            **kwargs,
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
        return self.attend_drafts(q, k, v, layer)


def _by_head(q: Any, k: Tensor, v: Tensor, layer: RadixAttention) -> tuple[Tensor, Tensor]:
    """Keys [S, g, .] and values [S, g, Dv]; for MLA's two parts the keys are the rotary ones."""
    if isinstance(q, tuple):
        q, k = q[1], k[..., layer.v_head_dim :]
    return k.view(len(k), -1, q.shape[-1]), v.view(len(v), -1, layer.v_head_dim)
