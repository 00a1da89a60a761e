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
    """Upstream's metadata, of which what is as long as the batch is made when first asked for.

    An extend in absorbed form asks for it. One that gathers the prefixes in chunks (FlashInfer)
    never does, and the buffer of 8 requests with a million tokens each takes 9.7 GB.
    """

    def __init__(
        self, new_buffer: Callable[[], Tensor], new_indices: Callable[[], Tensor], **fields: Any
    ) -> None:
        super().__init__(**fields)
        # The None that upstream puts before the properties.
        del self.dcp_kv_buffer, self.dcp_kv_indices
        self._new_buffer, self._new_indices = new_buffer, new_indices

    @cached_property
    def dcp_kv_buffer(self) -> Tensor:
        """[tokens, 1, width]: all prefixes, request after request, then all current chunks."""
        return self._new_buffer()

    @cached_property
    def dcp_kv_indices(self) -> Tensor:
        """int32 [tokens]: where the buffer has each request's tokens, in order of position."""
        return self._new_indices()


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

    `dcp_local_prefix_kv_indices`: rows of this rank's pool, request after request, position
    rising. `dcp_kv_indptr` int32 [B + 1]: where each request's tokens begin in `dcp_kv_indices`.
    No value is read back from the device.
    """
    parallel = get_parallel()
    if not parallel.dcp_enabled:
        return None
    shard = KVShard.of(parallel)
    prefix_total = sum(extend_prefix_lens_cpu)

    local_lens = shard.lens(extend_prefix_lens)
    local_total = sum(map(shard.lens, extend_prefix_lens_cpu))
    # Of the table as one row: the first slot of each request that is this rank's, every K-th on.
    first = req_pool_indices * req_to_token.shape[1] + shard.rank
    slots = req_to_token.flatten()[_runs(first, local_lens, shard.size, local_total, torch.int64)]

    def indices() -> Tensor:
        """A request's prefix, then its chunk, which the buffer has behind all prefixes."""
        starts = (_starts(extend_prefix_lens), prefix_total + _starts(extend_seq_lens))
        first = torch.stack(starts, dim=1).flatten()
        lens = torch.stack((extend_prefix_lens, extend_seq_lens), dim=1).flatten()
        return _runs(first, lens, 1, seq_lens_sum, torch.int32)

    indptr = torch.zeros(len(seq_lens) + 1, dtype=torch.int32, device=seq_lens.device)
    indptr[1:] = seq_lens.cumsum(0)
    return ExtendMetadata(
        lambda: torch.empty(
            (seq_lens_sum, *kv_buffer_shape[1:]), dtype=kv_cache_dtype, device=kv_cache_device
        ),
        indices,
        dcp_kv_indptr=indptr,
        dcp_local_prefix_kv_indices=get_attn_backend().kv_index_translator.translate_dcp_read_ids(
            slots
        ),
        dcp_extend_prefix_lens_sum=prefix_total,
    )


def _starts(lens: Tensor) -> Tensor:
    """Where each run begins when runs of `lens` [R] are laid end to end."""
    return lens.cumsum(0) - lens


def _runs(first: Tensor, lens: Tensor, step: int, total: int, dtype: torch.dtype) -> Tensor:
    """Runs laid end to end: first[r], first[r] + step, ..., lens[r] of them; `total` in all.

    One walk: a step for each entry, and where a run begins what leads to its first as well. So
    nothing is made per entry but the steps and their sums, and runs of no entry do no harm.
    """
    begins = _starts(lens)
    behind = first - step * begins
    steps = torch.full((total + 1,), step, dtype=dtype, device=lens.device)
    steps[:1] = 0
    steps.index_add_(0, begins, behind.diff(prepend=behind.new_zeros(1)).to(dtype))
    return steps.cumsum(0, dtype=dtype)[:total]
