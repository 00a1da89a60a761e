"""MLA extend over a sharded prefix: which latent rows this rank reads, and where they go.

Extends `sglang/srt/layers/dcp/planner.py`. Upstream picks every K-th entry of all requests'
prefixes laid end to end, which is right only while each prefix length is a multiple of K; after a
chunk that ends elsewhere it reads other ranks' rows. Here each request is counted on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from sglang.srt.layers.dcp.metadata import DecodeContextParallelMetadata
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_helix.srt.layers.dcp.ownership import KVShard


class ExtendMetadata(DecodeContextParallelMetadata):
    """Upstream's metadata, whose buffer is allocated when it is first asked for.

    An extend in absorbed form asks for it. One that gathers the prefixes in chunks (FlashInfer)
    never does, and the buffer of 8 requests with a million tokens each takes 9.7 GB.
    """

    def __init__(self, new_buffer: Callable[[], Tensor], **fields: Any) -> None:
        super().__init__(**fields)
        del self.dcp_kv_buffer  # the None that upstream puts before the property
        self._new_buffer = new_buffer

    @cached_property
    def dcp_kv_buffer(self) -> Tensor:
        """[tokens, 1, width]: all prefixes, request after request, then all current chunks."""
        return self._new_buffer()


def prepare_decode_context_parallel_metadata(
    seq_lens: Tensor,
    extend_prefix_lens: Tensor,
    extend_prefix_lens_cpu: Sequence[int],
    extend_seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens_sum: int,
    kv_buffer_shape: torch.Size,
    kv_cache_dtype: torch.dtype,
    kv_cache_device: torch.device | str,
    create_chunked_prefix_cache_kv_indices_fn: Callable[..., Any],
) -> DecodeContextParallelMetadata | None:
    """Plan one extend batch of B requests; None when the cache is not sharded.

    The gathered buffer holds all prefixes, request after request, then all current chunks.
    `dcp_local_prefix_kv_indices`: rows of this rank's pool, request after request, position
    rising. `dcp_kv_indptr` [B + 1] and `dcp_kv_indices` [seq_lens_sum] address each request's
    tokens in the buffer in order of position. No value is read back from the device.
    """
    parallel = get_parallel()
    if not parallel.dcp_enabled:
        return None
    shard = KVShard(parallel.attn_dcp_size, parallel.attn_dcp_rank)
    prefix_total = sum(extend_prefix_lens_cpu)

    local_lens = shard.lens(extend_prefix_lens)
    local_total = sum(
        (length + shard.size - 1 - shard.rank) // shard.size for length in extend_prefix_lens_cpu
    )
    request, nth = _enumerate(local_lens, local_total)
    slots = req_to_token[req_pool_indices[request], nth * shard.size + shard.rank]

    request, position = _enumerate(seq_lens, seq_lens_sum)
    prefix_start = _starts(extend_prefix_lens)[request]
    chunk_start = prefix_total + _starts(extend_seq_lens)[request]
    prefix_len = extend_prefix_lens[request]
    indices = torch.where(
        position < prefix_len, prefix_start + position, chunk_start + position - prefix_len
    )
    indptr = torch.zeros(len(seq_lens) + 1, dtype=torch.int32, device=seq_lens.device)
    indptr[1:] = seq_lens.cumsum(0)
    return ExtendMetadata(
        lambda: torch.empty(
            (seq_lens_sum, *kv_buffer_shape[1:]), dtype=kv_cache_dtype, device=kv_cache_device
        ),
        dcp_kv_indptr=indptr,
        dcp_kv_indices=indices.to(torch.int32),
        dcp_local_prefix_kv_indices=get_attn_backend().kv_index_translator.translate_dcp_read_ids(
            slots
        ),
        dcp_extend_prefix_lens_sum=prefix_total,
    )


def _starts(lens: Tensor) -> Tensor:
    """Where each request's run begins when runs of `lens` [B] are laid end to end."""
    return lens.cumsum(0) - lens


def _enumerate(lens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(request, place within it) of each of `total` entries of runs of `lens` [B]."""
    request = torch.repeat_interleave(
        torch.arange(len(lens), device=lens.device), lens, output_size=total
    )
    return request, torch.arange(total, device=lens.device) - _starts(lens)[request]
