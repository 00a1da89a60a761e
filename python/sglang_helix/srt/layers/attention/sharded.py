"""Decode and extend over a sequence-sharded KV cache, written once for every attention backend.

A backend's adapter supplies seam 3, partial attention, and nothing else: three functions from
(queries, some keys and values) to (out, natural-log LSE). Who owns which row is `KVShard`; how
partial results become whole ones is `Exchange`. The adapter sees neither.

Decode (GQA, MHA)     write the new token's K and V -> attend the local tokens with the heads of
                      the whole group -> exchange.
Extend (GQA, MHA)     the current chunk is whole on every rank: attend it with this rank's own
                      heads, no communication; attend the cached prefix like decode does; merge
                      the two by LSE.
MLA                   the model gathers queries before decode and exchanges after it (through
                      `layers/dcp/comm.py`), so decode returns (out, LSE) of the whole group's
                      heads. For extend it gathers the latent prefix instead, which for a chunk
                      of queries is far smaller, and this rank attends it with its own heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.logits_processor import get_in_autotune_dummy_run
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_helix.srt.layers.dcp.comm import deferred
from sglang_helix.srt.layers.dcp.exchange import BACKENDS, exchange_splits
from sglang_helix.srt.layers.dcp.lse_combine import combine
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class ShardedAttention(AttentionBackend):
    """Mixin in front of one of SGLang's attention backends.

    Shapes: T tokens of the batch, H query heads of the whole KVP group (H/K of them this rank's
    own), G key-value heads of the group. Outputs are [T, heads, Dv], LSEs fp32 [T, heads].
    """

    def __init__(self, model_runner: ModelRunner, **kwargs: Any) -> None:
        super().__init__(model_runner, **kwargs)
        parallel = get_parallel()
        self.kvp_group = parallel.dcp_group
        self.shard = KVShard(parallel.attn_dcp_size, parallel.attn_dcp_rank)
        self.pool_page_size: int = model_runner.page_size
        self.mla: bool = model_runner.use_mla_backend
        # MLA's exchange is in the model, through `layers/dcp/comm.py`; fi_a2a is one of its.
        self.comm_backend: str = parallel.dcp_comm_backend
        self.exchange = None if self.mla else BACKENDS[self.comm_backend].exchange
        # H: the query heads of the whole KVP group.
        self.heads: int = (
            model_runner.model_config.get_max_num_attention_heads()
            // parallel.tp_size
            * self.shard.size
        )
        self.write_rows: Tensor | None = None

    # Seam 3, supplied by the adapter.

    def partial_decode(
        self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial | Splits:
        """One query per request, q [T, H, Dk], over this rank's cached tokens.

        A backend that decodes in splits may leave their reduction to what comes next.
        """
        raise NotImplementedError

    def partial_current(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial:
        """The current chunk on itself, causal: q [T, h, Dk], k [T, g, Dk], v [T, g, Dv].

        In a verify pass the chunk is a tree of draft tokens, and `spec_info.custom_mask` says
        which of them each one sees.
        """
        raise NotImplementedError

    def partial_prefix(
        self,
        q: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        gathered: Tensor | None = None,
    ) -> Partial:
        """Queries of a chunk over the tokens cached before it, not causal.

        q [T, heads, Dk]. With `gathered` None: this rank's rows of the pool. Otherwise MLA's
        gathered prefix [sum of prefix lengths, 1, Dk], request after request, whole.
        """
        raise NotImplementedError

    # What SGLang calls.

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        super().init_forward_metadata(forward_batch)
        if forward_batch.out_cache_loc is not None:
            self.write_rows = self.shard.write_rows(
                forward_batch.out_cache_loc, self.pool_page_size
            )

    def forward_decode(
        self,
        q: Tensor,
        k: Any,
        v: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Attention of one new token per request.

        Returns [T, own heads * Dv], or for MLA the (out, LSE) of the whole group's heads, or what
        `deferred` makes of their splits.
        """
        q_rope, k_rope = _rope_parts(kwargs)
        if q_rope is not None:
            if save_kv_cache:
                self._store_mla(layer, forward_batch, k, k_rope)
            queries = _joined(q, q_rope, layer)
            partial = self.partial_decode(queries, layer, forward_batch)
            if not isinstance(partial, Splits):
                return partial
            # In FlashInfer's autotune pass the model goes on with the output, not exchanged.
            backend = BACKENDS.get(self.comm_backend)
            if backend and backend.takes_splits and not get_in_autotune_dummy_run():
                return deferred(partial, queries)
            return partial.merged(q.dtype)
        if save_kv_cache:
            self._store(layer, forward_batch, k, v)
        partial = self.partial_decode(self._group_heads(q, layer), layer, forward_batch)
        if isinstance(partial, Splits):
            out, _ = exchange_splits(self.comm_backend, partial, q.dtype, self.kvp_group)
        else:
            out, _ = self._own_heads(*partial)
        return out.flatten(1).to(q.dtype)

    def forward_extend(
        self,
        q: Tensor,
        k: Any,
        v: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of a chunk of new tokens per request: [T, own heads * Dv]."""
        q_rope, k_rope = _rope_parts(kwargs)
        has_prefix = _any_prefix(forward_batch)
        if q_rope is not None:
            queries = _joined(q, q_rope, layer)
            latent = torch.cat([k, k_rope.view(*k.shape[:-1], -1)], dim=-1)
            parts = [self.partial_current(queries, latent, k, layer, forward_batch)]
            if has_prefix:
                metadata = forward_batch.attn_dcp_metadata
                prefix = metadata.dcp_kv_buffer[: metadata.dcp_extend_prefix_lens_sum]
                parts.append(self.partial_prefix(queries, layer, forward_batch, prefix))
            if save_kv_cache:
                self._store_mla(layer, forward_batch, k, k_rope)
        else:
            if k is None:
                raise NotImplementedError(
                    f"layer {layer.layer_id} reads another layer's cache, which is not supported "
                    "with --dcp-size > 1: serve this model without --dcp-size"
                )
            queries = self._own_queries(q, layer)
            # MLA's un-absorbed chunk brings keys and values of its own heads, and no prefix.
            assert not (self.mla and has_prefix)
            own_k, own_v = (k, v) if self.mla else self._own_kv_heads(queries, k, v)
            parts = [self.partial_current(queries, own_k, own_v, layer, forward_batch)]
            if has_prefix:
                out, lse = self.partial_prefix(self._group_heads(q, layer), layer, forward_batch)
                parts.append(self._own_heads(out, lse))
            if save_kv_cache:
                self._store(layer, forward_batch, k, v)
        return _merged(parts).flatten(1).to(q.dtype)

    # Between the seams.

    def _group_heads(self, q: Tensor, layer: RadixAttention) -> Tensor:
        """Queries of the KVP group's heads, [T, H, Dk]: gathered, or projected by each rank."""
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).contiguous()
        if layer.tp_q_head_num == self.heads:
            return queries
        return self.kvp_group.all_gather(queries, dim=1).contiguous()

    def _own_queries(self, q: Tensor, layer: RadixAttention) -> Tensor:
        """Queries of this rank's own heads, [T, H/K, Dk]."""
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if layer.tp_q_head_num < self.heads:
            return queries
        own = self.heads // self.shard.size
        return queries[:, own * self.shard.rank : own * (self.shard.rank + 1)]

    def _own_heads(self, out: Tensor, lse: Tensor) -> Partial:
        """Exact attention of this rank's own heads, from every rank's partial results."""
        assert self.exchange is not None
        return self.exchange(out, lse, self.kvp_group)

    def _own_kv_heads(self, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """The key-value heads that this rank's own query heads attend to.

        q [T, h, .], k and v [T, G, .]. Heads come in groups of H / G queries per key-value head;
        where this rank's h heads cut through groups, each query head gets its own copy.
        """
        heads, groups = q.shape[1], k.shape[1]
        if groups == 1:
            return k, v
        per_group = heads * self.shard.size // groups
        first, last = heads * self.shard.rank, heads * (self.shard.rank + 1)
        if heads % per_group == 0 or per_group % heads == 0:
            wanted = slice(first // per_group, (last - 1) // per_group + 1)
            return k[:, wanted], v[:, wanted]
        index = torch.arange(first, last, device=k.device) // per_group
        return k[:, index], v[:, index]

    def _store(
        self, layer: RadixAttention, forward_batch: ForwardBatch, k: Tensor, v: Tensor
    ) -> None:
        assert self.write_rows is not None
        loc = KVWriteLoc(
            self.write_rows[: k.shape[0]], physical=forward_batch.out_cache_loc_is_physical
        )
        self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)

    def _store_mla(
        self,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        latent: Tensor,
        rope: Tensor,
    ) -> None:
        # The pool's MLA store takes widened slots and resolves their owner itself.
        loc = KVWriteLoc.for_batch(forward_batch)
        self.token_to_kv_pool.set_mla_kv_buffer(
            layer, loc, latent, rope.view(*latent.shape[:-1], -1)
        )


def _rope_parts(kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """MLA's rotary parts of query and key; refuses what no adapter computes."""
    q_rope, k_rope = kwargs.pop("q_rope", None), kwargs.pop("k_rope", None)
    if given := sorted(name for name, value in kwargs.items() if value is not None):
        raise NotImplementedError(
            f"attention with {', '.join(given)} is not supported with --dcp-size > 1"
        )
    return q_rope, k_rope


def _joined(q: Tensor, q_rope: Tensor, layer: RadixAttention) -> Tensor:
    heads = layer.tp_q_head_num
    return torch.cat(
        [q.reshape(-1, heads, layer.v_head_dim), q_rope.reshape(q_rope.shape[0], heads, -1)], dim=-1
    )


def _any_prefix(forward_batch: ForwardBatch) -> bool:
    """Whether any request of the batch has cached tokens: the same answer on every rank.

    The number of *local* cached tokens is not: with a short prefix some ranks hold none, and a
    rank that skipped the exchange would leave its peers waiting for ever.
    """
    lens = forward_batch.extend_prefix_lens_cpu
    return lens is None or any(lens)


def _merged(parts: list[Partial]) -> Tensor:
    if len(parts) == 1:
        return parts[0][0]
    outs, lses = zip(*parts, strict=True)
    common = torch.promote_types(outs[0].dtype, outs[1].dtype)
    return combine(torch.stack([out.to(common) for out in outs]), torch.stack(lses))
