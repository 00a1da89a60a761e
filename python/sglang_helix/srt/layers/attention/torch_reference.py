"""Reference attention in plain torch, over a cache that is whole: what kernels are tested against.

Upstream's ``torch_native`` has neither absorbed MLA nor an LSE. This one has both, for MHA, GQA,
MQA and MLA: one matrix product per request and nothing clever. All arithmetic is fp32, whatever
the dtype of the cache.

Attention over a set of keys is a *partial*: its normalised output together with the log-sum-exp
(LSE) of its logits. Partials over disjoint sets of keys merge exactly, so the extend path, which
attends to the current chunk and to the cached prefix, and a cache whose sequence is sharded over
ranks are the same computation.
"""

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.speculative.spec_info import SpecInputType

from sglang_helix.srt.layers.attention.windows import windowed
from sglang_helix.srt.layers.dcp.lse_combine import merge
from sglang_helix.srt.layers.dcp.partial import Partial


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    logit_cap: float = 0.0,
    visible: torch.Tensor | None = None,
) -> Partial:
    """Softmax attention of q over the given keys, accumulated in fp32.

    q [T, Hq, Dk], k [S, Hkv, Dk], v [S, Hkv, Dv] of any floating dtypes, Hkv dividing Hq; query
    head h reads key head h // (Hq / Hkv). scale multiplies the logits; logit_cap > 0 then bounds
    them to cap * tanh(logit / cap). visible, bool [T, S], says which keys a query sees (all when
    None). A query that sees no key, and S = 0, give out 0 and lse -inf.
    """
    T, Hq, Dk = q.shape
    S, Hkv, Dv = v.shape
    grouped = q.float().view(T, Hkv, Hq // Hkv, Dk)
    # In place from here on: of a long prompt these are hundreds of megabytes.
    logits = torch.einsum("tkgd,skd->tkgs", grouped, k.float()).mul_(scale)
    if logit_cap > 0:
        logits.div_(logit_cap).tanh_().mul_(logit_cap)
    if visible is not None:
        logits.masked_fill_(~visible.view(T, 1, 1, S), -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)  # -inf over nothing
    # -inf minus -inf is NaN: a row without keys subtracts 0 instead and keeps weights of 0.
    weights = logits.sub_(lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp_()
    out = torch.einsum("tkgs,skd->tkgd", weights, v.float())
    return Partial(out.reshape(T, Hq, Dv), lse.view(T, Hq))


def causal(queries: int, keys: int, back: int = -1) -> torch.Tensor:
    """bool [queries, keys]: the last query sees every key, each one before it one key less.

    back: how many keys before its own a query sees, at most; -1: all.
    """
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return visible.triu(keys - queries - back) if back > -1 else visible


def chunk_lens(forward_batch: Any) -> tuple[list[int], list[int]]:
    """How many new tokens each request brings, and how many cached ones stand before them.

    What a prefill brings is its chunk; what a verify pass brings are the draft tokens.
    """
    if forward_batch.forward_mode.is_target_verify():
        cached_lens = forward_batch.seq_lens.tolist()
        return [forward_batch.spec_info.draft_token_num] * len(cached_lens), cached_lens
    return list(forward_batch.extend_seq_lens_cpu), list(forward_batch.extend_prefix_lens_cpu)


def chunk_masks(forward_batch: Any) -> list[torch.Tensor]:
    """For each request bool [new, new]: which of the new tokens each new token sees.

    Draft tokens are a tree: a token sees its ancestors and itself. SGLang's mask of a request has
    a row for each draft token, over the cached tokens, all of them visible, and the draft tokens.
    """
    lens, cached_lens = chunk_lens(forward_batch)
    if not forward_batch.forward_mode.is_target_verify():
        return [causal(length, length) for length in lens]
    sizes = [length * (cached + length) for length, cached in zip(lens, cached_lens, strict=True)]
    masks = forward_batch.spec_info.custom_mask[: sum(sizes)].split(sizes)
    return [mask.view(length, -1)[:, -length:] for mask, length in zip(masks, lens, strict=True)]


class TorchReferenceAttnBackend(AttentionBackend):
    """``torch_native``: decode, extend, chunked prefill and prefix-cache hits on any device."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        # SGLang reads the pools off its attention backend under these names.
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool

    def support_triton(self) -> bool:
        """No: SGLang then prepares its indices with torch as well."""
        return False

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """How many tokens a request has that is padding."""
        return 1

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One query token per request over all its cached tokens, this one included.

        q [B, Hq * Dk] or [B, Hq, Dk], sinks [Hq] -> [B, Hq * Dv] in q's dtype.
        """
        refuse_unsupported(layer, forward_batch)
        if save_kv_cache and k is not None:
            self._write(layer, forward_batch, k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        slots = [self._rows(layer, slots) for slots in self.decoded_slots(forward_batch)]
        partial = self.rows_partial(q, layer, [1] * len(q), slots, own=True)
        return merge(partial, None, out_dtype=q.dtype, sinks=sinks).flatten(1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The new tokens of each request, causal among themselves, over the cached prefix.

        q [T, Hq * Dk] or [T, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv] -> [T, Hq * Dv] in q's dtype;
        requests stand one after the other. The prefix is read from the pool, the new tokens from
        k and v (from the pool where a layer shares another's cache and brings none).
        """
        refuse_unsupported(layer, forward_batch)
        if save_kv_cache and k is not None:
            self._write(layer, forward_batch, k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if k is None or v is None:
            slots = self._rows(layer, forward_batch.out_cache_loc)
            k, v = (part[slots] for part in self.token_to_kv_pool.get_kv_buffer(layer.layer_id))
        partial = self.chunk_partial(q, k, v, layer, forward_batch)
        lens, cached_lens = chunk_lens(forward_batch)
        prefix = None
        if any(cached_lens):
            prefix = self.cached_partial(q, layer, forward_batch, lens, cached_lens)
        return merge(partial, prefix, out_dtype=q.dtype, sinks=sinks).flatten(1)

    def chunk_partial(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any
    ) -> Partial:
        """Each request's new tokens over those of its own new tokens that they may see."""
        lens, _ = chunk_lens(forward_batch)
        k = k.view(len(q), -1, layer.qk_head_dim)
        v = v.view(len(q), -1, layer.v_head_dim)
        chunks = zip(q.split(lens), k.split(lens), v.split(lens), strict=True)
        parts = (
            self._partial(
                layer,
                q_r,
                k_r,
                v_r,
                visible.triu(-layer.sliding_window_size).to(q.device)
                if windowed(layer)
                else visible.to(q.device),
            )
            for (q_r, k_r, v_r), visible in zip(chunks, chunk_masks(forward_batch), strict=True)
        )
        return concatenated(parts)

    def cached_partial(
        self,
        q: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        query_lens: list[int],
        cached_lens: list[int],
        which: slice = slice(None),
    ) -> Partial:
        """Each request's query tokens over the first cached_lens tokens of its cache, all visible.

        q [T, Hq, Dk], its rows split over the requests, `which` of the batch, by query_lens; they
        stand behind the cached tokens.
        """
        requests = forward_batch.req_pool_indices[which].tolist()
        rows = [
            self.cached_rows(layer, *cached) for cached in zip(requests, cached_lens, strict=True)
        ]
        return self.rows_partial(q, layer, query_lens, rows)

    def rows_partial(
        self,
        q: torch.Tensor,
        layer: Any,
        query_lens: list[int],
        rows: list[torch.Tensor],
        *,
        own: bool = False,
    ) -> Partial:
        """Groups of queries, split by query_lens, each over its own rows of the pool.

        The queries stand behind the tokens of these rows, or with `own` are the last of them: that
        decides what is in a window.
        """
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        parts = []
        for q_r, rows_r in zip(q.split(query_lens), rows, strict=True):
            visible = None
            if windowed(layer):
                length, behind = len(rows_r), 0 if own else len(q_r)
                visible = causal(len(q_r), length + behind, layer.sliding_window_size)[:, :length]
                visible = visible.to(q.device)
            parts.append(self._partial(layer, q_r, keys[rows_r], values[rows_r], visible))
        return concatenated(parts)

    def decoded_slots(self, forward_batch: Any) -> list[torch.Tensor]:
        """Slots that each query of a decode batch sees; a draft model's see their branch too."""
        requests = zip(
            forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist(), strict=True
        )
        return [self._slots(request, length) for request, length in requests]

    def cached_rows(self, layer: Any, request: int, length: int) -> torch.Tensor:
        """Rows of a layer's pool, int64 [length], of the first `length` tokens of a request."""
        return self._rows(layer, self._slots(request, length))

    def _slots(self, request: int, length: int) -> torch.Tensor:
        return self.req_to_token_pool.req_to_token[request, :length].long()

    def _rows(self, layer: Any, slots: torch.Tensor) -> torch.Tensor:
        """Where a layer's pool has these slots: windows that left theirs read a row of others."""
        pool = self.token_to_kv_pool
        if isinstance(pool, SWAKVPool) and windowed(layer):
            return pool.translate_loc_from_full_to_swa(slots)
        return slots

    def _partial(
        self,
        layer: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: torch.Tensor | None,
    ) -> Partial:
        return partial_attention(
            q, k, v, scale=layer.scaling, logit_cap=layer.logit_cap, visible=visible
        )

    def _write(
        self, layer: Any, forward_batch: Any, k: torch.Tensor, v: torch.Tensor | None
    ) -> None:
        slots = forward_batch.out_cache_loc
        self.token_to_kv_pool.set_kv_buffer(
            layer, KVWriteLoc(slots, self._rows(layer, slots)), k, v
        )


_DRAFTS = (
    SpecInputType.NGRAM_VERIFY,
    SpecInputType.EAGLE_DRAFT,
    SpecInputType.EAGLE_DRAFT_EXTEND,
    SpecInputType.EAGLE_VERIFY,
)


def refuse_unsupported(layer: Any, forward_batch: Any) -> None:
    """Raise NotImplementedError for attention this backend would compute wrongly."""
    reasons = {
        "cross attention": layer.is_cross_attention,
        "encoder-only attention": layer.attn_type != AttentionType.DECODER,
        "temperature scaling by position": layer.xai_temperature_len > 0,
        f"logit capping by {layer.logit_capping_method}": layer.logit_cap > 0
        and layer.logit_capping_method != "tanh",
        "speculative decoding but with n-grams, EAGLE and draft models": forward_batch.spec_info
        is not None
        and forward_batch.spec_info.spec_input_type not in _DRAFTS,
    }
    for reason, applies in reasons.items():
        if applies:
            raise NotImplementedError(
                f"--attention-backend torch_native does not support {reason} "
                f"(layer {layer.layer_id}); use --attention-backend triton."
            )


def concatenated(parts: Iterable[Partial]) -> Partial:
    """Partials of one query after the other."""
    outs, lses = zip(*parts, strict=True)
    return Partial(torch.cat(outs), torch.cat(lses))
