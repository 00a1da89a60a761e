"""Sliding windows cut by owner: of layers whose window has no pool of its own.

Tokens go to the ranks of a group in turn. So of any W tokens in a row each rank holds W / K, the
last ones that it holds, wherever the window stands: at decode it is a window of W / K local tokens.

A chunk's queries have a window each, which ends a token further from one to the next, but a local
token further only from one to the K-th next, which no kernel masks. But all that they see of the
cached prefix are its last W - 1 tokens. These the ranks gather, and the chunk is attended behind
them with a rank's own heads, as if there were no other prefix: nothing is left to be exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from torch import Tensor, nn

from sglang_helix.srt.layers.attention.prefixes import summed_on_host
from sglang_helix.srt.layers.dcp.ownership import KVShard


def windowed(layer: RadixAttention) -> bool:
    """Whether a layer sees a sliding window; its `sliding_window_size` is how far back it sees."""
    return layer.sliding_window_size > -1


def attention_layers(model: nn.Module) -> list[RadixAttention]:
    """Every attention layer of a model."""
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def sharded_layers(model: nn.Module, model_config: Any) -> list[RadixAttention]:
    """Those whose cache goes by owner: all but windows that have a pool of their own."""
    pooled = model_config.is_hybrid_swa
    return [layer for layer in attention_layers(model) if not (pooled and windowed(layer))]


def window_of(model: nn.Module) -> int:
    """Keys that the window layers of a model see, the query's own included; 0: it has none."""
    return max((layer.sliding_window_size + 1 for layer in attention_layers(model)), default=0)


@dataclass(frozen=True)
class Tails:
    """What the chunks of a batch see of their cached prefixes through windows; S tokens in all.

    A request brings n new tokens behind t cached ones that its first query sees.
    """

    lens: list[int]
    """t of each request."""
    rows: Tensor
    """[R] int64: this rank's rows of them, as many as every other rank's, so some are of others."""
    order: Tensor
    """[S] int64: where they stand, request after request, in what all ranks bring [K * R]."""
    behind: Tensor
    """[S + T] int64: for each request t of the S tokens, then n of the T new ones, counted on."""
    cu_tails: Tensor
    """[B + 1] int32: where each request's tail begins, and where the last one's ends."""
    cu_keys: Tensor
    """[B + 1] int32: the same of tails and new tokens together."""
    longest: int
    """The most tokens of a request, tail and new ones."""

    @classmethod
    def of(
        cls,
        window: int,
        prefixes: Sequence[int],
        chunks: Sequence[int],
        requests: Tensor,
        req_to_token: Tensor,
        shard: KVShard,
    ) -> Tails:
        """The tails of requests [B] with cached prefixes and chunks of so many tokens.

        req_to_token: widened slots, one row a request of the pool.
        """
        device, size = requests.device, shard.size
        lens = [min(prefix, window - 1) for prefix in prefixes]
        owner, positions, order = [], [], []
        brought = 0
        for request, (prefix, length) in enumerate(zip(prefixes, lens, strict=True)):
            first = (prefix - length) // size * size
            held = -(-(prefix - first) // size)
            # The last ones may lie beyond the prefix: what is brought in their place is not read.
            mine = first + shard.rank + size * torch.arange(held)
            positions.append(mine.clamp(max=max(prefix - 1, 0)))
            owner.append(torch.full((held,), request))
            seen = torch.arange(prefix - length, prefix)
            order.append((seen % size, brought + (seen - first) // size))
            brought += held
        places, ranks = torch.cat(positions), torch.cat([rank for rank, _ in order])
        at = torch.cat([row for _, row in order])
        slots = req_to_token[requests[torch.cat(owner).to(device)], places.to(device)]
        behind = []
        tails, news = 0, sum(lens)
        for length, chunk in zip(lens, chunks, strict=True):
            behind += [torch.arange(tails, tails + length), torch.arange(news, news + chunk)]
            tails, news = tails + length, news + chunk
        keys = [length + chunk for length, chunk in zip(lens, chunks, strict=True)]
        return cls(
            lens,
            slots.long() // size,
            (ranks * brought + at).to(device),
            torch.cat(behind).to(device),
            summed_on_host(lens).to(device),
            summed_on_host(keys).to(device),
            max(keys),
        )

    def gathered(self, layer: RadixAttention, pool: Any, like: Tensor, group: Any) -> Any:
        """Keys [S, G, Dk] and values [S, G, Dv] of the group's heads, of the dtype of `like`."""
        keys, values = pool.get_kv_buffer(layer.layer_id)
        if not any(self.lens):  # on every rank
            return tuple(
                part.new_empty((0, *part.shape[1:]), dtype=like.dtype) for part in (keys, values)
            )
        widths = [part[0].numel() for part in (keys, values)]
        rows = torch.cat([part[self.rows].flatten(1) for part in (keys, values)], dim=1)
        # Collectives of a group know no fp8.
        raw = rows.view(torch.uint8) if rows.element_size() == 1 else rows
        everyones = group.all_gather(raw, dim=0).view(rows.dtype)[self.order].to(like.dtype)
        tail_k, tail_v = everyones.split(widths, dim=1)
        if layer.k_scale is not None and layer.v_scale is not None:
            tail_k, tail_v = tail_k * layer.k_scale_float, tail_v * layer.v_scale_float
        return tail_k.view(-1, *keys.shape[1:]), tail_v.view(-1, *values.shape[1:])

    def before(self, tail: Tensor, new: Tensor) -> Tensor:
        """Every request's tail and new tokens, [S + T, g, D]: tail [S, g, D], new [T, g, D]."""
        return torch.cat([tail, new])[self.behind] if any(self.lens) else new
