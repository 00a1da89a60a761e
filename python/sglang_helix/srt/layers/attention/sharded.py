"""Decode and extend over a sequence-sharded KV cache, written once for every attention backend.

A backend's adapter supplies seam 3, partial attention, and nothing else: three functions from
(queries, some keys and values) to (out, natural-log LSE). Who owns which row is `KVShard`, by way
of `OwnedRows`; how partial results become whole ones is `Exchanger`. The adapter sees neither.

Decode (GQA, MHA)     write the new token's K and V -> attend the local tokens with the heads of
                      the whole group -> exchange.
Extend (GQA, MHA)     the current chunk is whole on every rank: attend it with this rank's own
                      heads, no communication; attend the cached prefix like decode does; merge
                      the two by LSE.
Verify                an extend whose chunk is a tree of drafts. All of them see the whole prefix,
                      so to the kernel of decode they can be more heads of their request (`fold`).
Windows               layers of a sliding window that have a pool of their own are not sharded:
                      upstream's own code attends them, with this rank's heads over a pool that is
                      whole on every rank. Others are, and cut by owner: see `windows.py`.
MLA                   the model gathers queries before decode and exchanges after it (through
                      `layers/dcp/comm.py`), so decode returns (out, LSE) of the whole group's
                      heads. For extend it gathers the latent prefix instead, which for a chunk
                      of queries is far smaller, and this rank attends it with its own heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.logits_processor import get_in_autotune_dummy_run
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_helix.helix import SeriesError
from sglang_helix.srt.configs.model_config import sharded_heads
from sglang_helix.srt.layers.attention.adapters import record_of
from sglang_helix.srt.layers.attention.drafts import Drafted, Drafts, fold, unfolded
from sglang_helix.srt.layers.attention.owned_rows import OwnedRows
from sglang_helix.srt.layers.attention.prefixes import prefixed
from sglang_helix.srt.layers.attention.windows import Tails, window_of, windowed
from sglang_helix.srt.layers.dcp.comm import deferred
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from sglang_helix.srt.layers.dcp.gather import all_gather, joined
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits, merge
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class ShardedAttention(Drafts, OwnedRows):
    """Mixin in front of one of SGLang's attention backends.

    Shapes: T tokens of the batch, H query heads of the whole KVP group (H/K of them this rank's
    own), G key-value heads of the group. Outputs are [T, heads, Dv], LSEs fp32 [T, heads], to the
    base that the adapter's record says.
    """

    # MLA's un-absorbed chunks and their gathered prefix, which no rank shares: upstream's own code
    # attends them, with its own metadata.
    upstream_prefill = False

    # Whether the model has window layers, whose pool is whole.
    windows = False

    def __init__(self, model_runner: ModelRunner, **kwargs: Any) -> None:
        if model_runner.is_draft_worker:
            raise SeriesError("a draft's cache is whole; its attention must not go by owner")
        super().__init__(model_runner, **kwargs)
        parallel = get_parallel()
        self.kvp_group = parallel.dcp_group
        self.shard = KVShard.of(parallel)
        self.pool_page_size = model_runner.page_size
        self.device = model_runner.device  # not every backend of SGLang keeps it
        self.mla = model_runner.use_mla_backend
        self.windows = isinstance(model_runner.token_to_kv_pool, SWAKVPool)
        if not self.windows:
            self.window = window_of(model_runner.model)
        if self.window % self.shard.size or (self.window and not record_of(type(self)).windows):
            # The loader and the table refuse it first.
            raise SeriesError(f"{type(self).__name__} does not cut windows of {self.window}")
        # MLA's exchange is in the model, through `layers/dcp/comm.py`. There is none where it is
        # fi_a2a, which is upstream's and MLA's alone.
        self.exchanger: Exchanger | None = getattr(self.kvp_group, "exchanger", None)
        if self.exchanger is None and not self.mla:
            raise SeriesError(f"no {parallel.dcp_comm_backend} exchange was made for the KVP group")
        # H: the query heads of the whole KVP group.
        self.heads: int = (
            sharded_heads(model_runner.model_config) // parallel.attn_tp_size * self.shard.size
        )
        self.base2: bool = record_of(type(self)).base2

    # Seam 3, supplied by the adapter.

    def partial_decode(
        self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial | Splits | Masked:
        """One query per request, q [T, H, Dk], over this rank's cached tokens.

        In a window layer over the last `local_window` of them. A backend that decodes in splits
        may leave their reduction to what comes next; of GQA, one whose LSEs do not say which
        requests have no tokens may leave that to it too. The adapter's record says the form.
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
    ) -> Partial | Drafted:
        """Queries of a chunk over the tokens cached before it, not causal.

        With `gathered` None: q [t, heads, Dk] of the requests that `prefixed` names, over this
        rank's rows of the pool. Otherwise q [T, heads, Dk] of all requests over MLA's gathered
        prefix [sum of prefix lengths, 1, Dk], request after request, whole. A verify pass may
        leave what `as_heads` makes of its drafts.
        """
        raise NotImplementedError

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
        """The current chunk behind the tail of its prefix, causal, in windows of `window` keys.

        As `partial_current` with tail_k [S, g, Dk], tail_v [S, g, Dv], whole, request after
        request.
        """
        raise NotImplementedError

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
        """A window layer, as plain TP attends it: [T, own heads * Dv]."""
        decode = forward_batch.forward_mode.is_decode_or_idle()
        attend = super().forward_decode if decode else super().forward_extend
        counted = {} if sinks is None else {"sinks": sinks}
        return attend(q, k, v, layer, forward_batch, save_kv_cache, **counted)

    # What SGLang calls.

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        super().init_forward_metadata(forward_batch)
        self.prepare_writes(forward_batch)
        self.prepare_drafts(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate what captured graphs read; filled anew before every replay."""
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args)
        self.allocate_captured_writes(max_num_tokens)
        self.allocate_captured_drafts(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Prepare the capture or one replay of a decode graph, in place."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self.prepare_captured_drafts(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Record what a decode graph prepares for itself."""
        super().init_forward_metadata_in_graph(forward_batch)
        self.prepare_captured_writes(forward_batch)

    def get_fused_kv_write_buffers(
        self, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> None:
        """None: the fused kernels write at slots, not at rows."""

    def forward(
        self,
        q: Tensor,
        k: Any,
        v: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        """What SGLang calls. An idle attention replica brings padding alone, as wide as the rest.

        Upstream's is as wide as the heads that the layer projects, which may be the whole group's.
        """
        if forward_batch.forward_mode.is_idle() and not self.mla:
            return q.new_empty(q.shape[0], self.heads // self.shard.size * layer.v_head_dim)
        return super().forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_decode(
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
        """Attention of one new token per request.

        sinks: of the heads that the layer projects, natural logarithm; see `exchange.py`.
        Returns [T, own heads * Dv], or for MLA the (out, LSE) of the whole group's heads, or what
        `deferred` makes of their splits.
        """
        if self.windows and windowed(layer):
            return self._window(q, k, v, layer, forward_batch, save_kv_cache, sinks, **kwargs)
        self._tell_exchange(layer)
        sinks = self._own_sinks(sinks)
        q_rope, k_rope = _rope_parts(kwargs)
        if q_rope is not None:
            if save_kv_cache:
                self._store_mla(layer, forward_batch, k, k_rope)
            queries = self.mla_queries(q, q_rope, layer)
            partial = self.partial_decode(queries, layer, forward_batch)
            if not isinstance(partial, Splits):
                return partial
            # In FlashInfer's autotune pass the model goes on with the output, not exchanged.
            if self.exchanger and self.exchanger.takes_splits and not get_in_autotune_dummy_run():
                return deferred(partial, queries)
            return combine_splits(partial, q.dtype)
        if save_kv_cache:
            self._store(layer, forward_batch, k, v)
        partial = self.partial_decode(self._group_heads(q, layer), layer, forward_batch)
        out, _ = self._own_heads(partial, q.dtype, sinks=sinks)
        return out.flatten(1)

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
        """Attention of a chunk of new tokens per request: [T, own heads * Dv].

        sinks: as in decode, counted where the chunk and its prefix are merged.
        For MLA's un-absorbed chunks what upstream returns, which may be (out, LSE). For drafts of
        MLA, whose queries the model gathers as it does before decode, (out, LSE) of the whole
        group's heads.
        """
        if self.windows and windowed(layer):
            return self._window(q, k, v, layer, forward_batch, save_kv_cache, sinks, **kwargs)
        self._tell_exchange(layer)
        sinks = self._own_sinks(sinks)
        q_rope, k_rope = _rope_parts(kwargs)
        if self.mla and q_rope is None and self.upstream_prefill:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        prefix = prefixed(forward_batch)
        first, part = 0, None
        if q_rope is not None:
            queries = self.mla_queries(q, q_rope, layer)
            latent = torch.cat([k, k_rope.view(*k.shape[:-1], -1)], dim=-1)
            if forward_batch.forward_mode.is_target_verify():
                if save_kv_cache:
                    self._store_mla(layer, forward_batch, k, k_rope)
                return self._verified_mla(queries, latent, k, layer, forward_batch)
            current = self.partial_current(queries, latent, k, layer, forward_batch)
            if prefix is not None:
                metadata = forward_batch.attn_dcp_metadata
                gathered = metadata.dcp_kv_buffer[: metadata.dcp_extend_prefix_lens_sum]
                attended = self.partial_prefix(queries, layer, forward_batch, gathered)
                assert isinstance(attended, Partial)
                part = attended
            if save_kv_cache:
                self._store_mla(layer, forward_batch, k, k_rope)
        else:
            _refuse_shared(layer, k)
            queries = self._own_queries(q, layer)
            # MLA's un-absorbed chunk brings keys and values of its own heads, and no prefix.
            assert not (self.mla and prefix is not None)
            own_k, own_v = (k, v) if self.mla else self._own_kv_heads(queries, k, v)
            if windowed(layer):
                current = self._behind_tails(queries, own_k, own_v, layer, forward_batch)
                prefix = None  # what windows see of it has been counted
            else:
                current = self.partial_current(queries, own_k, own_v, layer, forward_batch)
            if prefix is not None:
                first = prefix.tokens.start or 0
                cached = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)[prefix.tokens]
                queries = self._group_heads(cached, layer)
                part = self._own_heads(self.partial_prefix(queries, layer, forward_batch), q.dtype)
            if save_kv_cache:
                self._store(layer, forward_batch, k, v)
        out = merge(current, part, first=first, out_dtype=q.dtype, base2=self.base2, sinks=sinks)
        return out.flatten(1)

    # Between the seams.

    def mla_queries(self, q: Tensor, q_rope: Tensor, layer: RadixAttention) -> Any:
        """MLA's queries as `partial_decode` and the others take them: [T, heads, latent + rope]."""
        return joined(*mla_parts(q, q_rope, layer))

    def _window(
        self,
        q: Tensor,
        k: Any,
        v: Any,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        sinks: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        _rope_parts(kwargs)
        _refuse_shared(layer, k)
        return self.attend_window(q, k, v, layer, forward_batch, save_kv_cache, sinks)

    def _behind_tails(
        self, queries: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch
    ) -> Partial:
        """A chunk of a window layer: k and v [T, g, .] and what was cached before them."""
        if self.tails is None:
            raise NotImplementedError("drafts of models with sliding windows are not verified")
        tail = self.tails.gathered(layer, self.token_to_kv_pool, k, self.kvp_group)
        own_tail = self._own_kv_heads(queries, *tail)
        return self.partial_window(queries, k, v, layer, batch, self.tails, *own_tail)

    def _group_heads(self, q: Tensor, layer: RadixAttention) -> Tensor:
        """Queries of the KVP group's heads, [T, H, Dk]: gathered, or projected by each rank."""
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if layer.tp_q_head_num == self.heads:
            return queries
        return all_gather((queries,), self.kvp_group, layer.layer_id)

    def _own_queries(self, q: Tensor, layer: RadixAttention) -> Tensor:
        """Queries of this rank's own heads, [T, H/K, Dk]."""
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if layer.tp_q_head_num < self.heads:
            return queries
        own = self.heads // self.shard.size
        return queries[:, own * self.shard.rank : own * (self.shard.rank + 1)]

    def _tell_exchange(self, layer: RadixAttention) -> None:
        if self.exchanger is not None:
            self.exchanger.layer = layer.layer_id

    def _own_heads(
        self,
        partial: Partial | Splits | Masked | Drafted,
        dtype: torch.dtype,
        sinks: Tensor | None = None,
    ) -> Partial:
        """Exact attention of this rank's own heads, from every rank's partial results.

        On the wire in the model's dtype, which is what symm carries.
        """
        assert self.exchanger is not None
        if not isinstance(partial, Drafted):
            return self.exchanger(partial, dtype, base2=self.base2, sinks=sinks)
        drafts, chunks = partial.drafts, partial.chunks
        if chunks % self.shard.size:  # some chunk has heads of two ranks
            return self._own_heads(partial.merged(dtype), dtype, sinks)
        own = self.exchanger(partial.partial, dtype, base2=self.base2, sinks=sinks, drafts=drafts)
        return unfolded(own, drafts, chunks // self.shard.size)

    def as_heads(
        self, decode: Callable[[Tensor], Partial | Splits], q: Tensor, kv_heads: int
    ) -> Drafted:
        """Drafts q [T, H, Dk] over the cached tokens of their requests, by a kernel of decode.

        It takes them as more heads of one query, in chunks that are of one key-value head and, if
        one is a multiple of the other, of one rank.
        """
        per_group, own = self.heads // kv_heads, self.heads // self.shard.size
        chunk = own if per_group % own == 0 else per_group
        chunks = self.heads // chunk
        return Drafted(decode(fold(q, self.drafts, chunks)), self.drafts, chunks)

    def _own_sinks(self, sinks: Tensor | None) -> Tensor | None:
        """The sinks of this rank's own heads, [H/K], of those that the layer projects."""
        if sinks is None:
            return None
        if self.mla:
            raise NotImplementedError(
                "attention sinks of MLA are not supported with --dcp-size > 1"
            )
        if len(sinks) < self.heads:
            return sinks
        return sinks.chunk(self.shard.size)[self.shard.rank]

    def _own_kv_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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

    def _verified_mla(
        self, queries: Any, latent: Tensor, k: Tensor, layer: RadixAttention, batch: ForwardBatch
    ) -> Partial:
        """A verify pass of MLA, before the model's exchange: [T, H, Dv] and its LSE.

        The drafts, which every rank has whole, are counted once: by the rank of place 0.
        """
        part = self.partial_prefix(queries, layer, batch)
        if isinstance(part, Drafted):
            part = part.merged(k.dtype)
        current = None
        if self.shard.rank == 0:
            current = self.partial_current(queries, latent, k, layer, batch)
        return merge(part, current, out_dtype=k.dtype, base2=self.base2, return_lse=True)


def _rope_parts(kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """MLA's rotary parts of query and key; refuses what no adapter computes."""
    q_rope, k_rope = kwargs.pop("q_rope", None), kwargs.pop("k_rope", None)
    if given := sorted(name for name, value in kwargs.items() if value is not None):
        raise NotImplementedError(
            f"attention with {', '.join(given)} is not supported with --dcp-size > 1"
        )
    return q_rope, k_rope


def mla_parts(q: Tensor, q_rope: Tensor, layer: RadixAttention) -> tuple[Tensor, Tensor]:
    """MLA's queries by head, the two parts apart: [T, heads, latent] and [T, heads, rope]."""
    heads = layer.tp_q_head_num
    return q.reshape(-1, heads, layer.v_head_dim), q_rope.reshape(q_rope.shape[0], heads, -1)


def _refuse_shared(layer: RadixAttention, k: Any) -> None:
    if k is None:
        raise NotImplementedError(
            f"layer {layer.layer_id} reads another layer's cache, which is not supported "
            "with --dcp-size > 1: serve this model without --dcp-size"
        )
