"""Adapter in plain torch, under SGLang's backend name ``torch_native``: see `torch_reference.py`.

What the other adapters are tested against, one request at a time and nothing clever.
"""

from typing import Any

import torch

from sglang_helix.srt.layers.attention.prefixes import prefixed
from sglang_helix.srt.layers.attention.sharded import ShardedAttention
from sglang_helix.srt.layers.attention.torch_reference import (
    TorchReferenceAttnBackend,
    causal,
    chunk_lens,
    concatenated,
    refuse_unsupported,
)
from sglang_helix.srt.layers.attention.windows import Tails, windowed
from sglang_helix.srt.layers.dcp.partial import Partial


class ShardedTorchReferenceAttnBackend(ShardedAttention, TorchReferenceAttnBackend):
    """``torch_native`` over a sharded cache: GQA, MHA and MLA."""

    def cached_rows(self, layer: Any, request: int, length: int) -> torch.Tensor:
        """Rows of this rank's tokens among the first `length` of a request.

        Of windows with a pool of their own, of all tokens.
        """
        rows = super().cached_rows(layer, request, length)
        return rows if self.windows and windowed(layer) else self.shard.read_rows(rows)

    def partial_decode(self, q: torch.Tensor, layer: Any, forward_batch: Any) -> Partial:
        """See `ShardedAttention.partial_decode`."""
        refuse_unsupported(layer, forward_batch)
        requests = zip(
            forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist(), strict=True
        )
        rows = [self.cached_rows(layer, *cached) for cached in requests]
        if windowed(layer):
            rows = [held[-self.local_window :] for held in rows]
        return self.rows_partial(q, layer, [1] * len(q), rows, own=True)

    def partial_current(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any
    ) -> Partial:
        """See `ShardedAttention.partial_current`."""
        refuse_unsupported(layer, forward_batch)
        return self.chunk_partial(q, k, v, layer, forward_batch)

    def partial_window(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        tails: Tails,
        tail_k: torch.Tensor,
        tail_v: torch.Tensor,
    ) -> Partial:
        """See `ShardedAttention.partial_window`."""
        refuse_unsupported(layer, forward_batch)
        chunks = list(forward_batch.extend_seq_lens_cpu)
        spans = [tail + chunk for tail, chunk in zip(tails.lens, chunks, strict=True)]
        seen = zip(
            q.split(chunks),
            tails.before(tail_k, k).split(spans),
            tails.before(tail_v, v).split(spans),
            strict=True,
        )
        return concatenated(
            self._partial(
                layer, q_r, k_r, v_r, causal(len(q_r), len(k_r), self.window - 1).to(q.device)
            )
            for q_r, k_r, v_r in seen
        )

    def partial_prefix(
        self,
        q: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        gathered: torch.Tensor | None = None,
    ) -> Partial:
        """See `ShardedAttention.partial_prefix`."""
        chunks, prefixes = chunk_lens(forward_batch)
        if gathered is None:
            found = prefixed(forward_batch)
            assert found is not None
            which = found.requests
            return self.cached_partial(
                q, layer, forward_batch, chunks[which], prefixes[which], which
            )
        return concatenated(
            self._partial(layer, q_r, rows, rows[..., : layer.v_head_dim], None)
            for q_r, rows in zip(q.split(chunks), gathered.split(prefixes), strict=True)
        )
