"""Adapter for FlashInfer with GQA and MHA. Extends `layers/attention/flashinfer_backend.py`.

MLA with FlashInfer is complete upstream. Here decode and the cached prefix are planned with the
heads of the whole KVP group over this rank's rows, in pages of one token as upstream does, and the
chunk with this rank's own heads. Every plan is made of lengths that the host knows, so that none
waits for the device. LSEs are base 2, [T, heads]; a request without tokens gets 0 and -inf.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    fast_decode_plan,
)
from sglang.kernels.ops.attention.dcp_kernels import create_triton_kv_indices_for_dcp_triton
from sglang.srt.layers.attention.flashinfer_backend import (
    DecodeMetadata,
    FlashInferAttnBackend,
    PrefillMetadata,
    should_use_tensor_core,
)
from torch import Tensor

from sglang_helix.srt.layers.attention.sharded import ShardedAttention, prefixed, visible_drafts

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_helix.srt.layers.dcp.partial import Partial


class ShardedFlashInferAttnBackend(ShardedAttention, FlashInferAttnBackend):
    """`flashinfer` over a sharded cache: GQA and MHA.

    H query and G key-value heads of the group, h and g of them for this rank's chunk.
    """

    def __init__(self, model_runner: ModelRunner, **kwargs: Any) -> None:
        super().__init__(model_runner, init_new_workspace=model_runner.init_new_workspace, **kwargs)
        unserved = {
            "sliding windows or cross attention": self.num_wrappers > 1,
            "a cache in fp4": self.prefill_uses_dequant_workspace
            or self.decode_uses_dequant_workspace,
            "multi-item scoring": self.enable_mis,
            "deterministic inference": self.enable_deterministic,
        }
        for what, asked in unserved.items():
            if asked:
                raise NotImplementedError(
                    f"--attention-backend flashinfer does not serve {what} with --dcp-size > 1: "
                    "use --attention-backend triton"
                )
        self.device: str = model_runner.device
        self.group_kv_heads: int = self.indices_updater_decode.num_kv_heads
        self.head_dim: int = self.indices_updater_decode.head_dim
        self.q_dtype: torch.dtype = model_runner.dtype
        # Upstream looked at the heads of one rank.
        self.decode_use_tensor_cores = should_use_tensor_core(
            self.flashinfer_kv_cache_dtype, self.heads, self.group_kv_heads
        )
        self.decode_wrappers = [
            BatchDecodeWithPagedKVCacheWrapper(
                self.workspace_buffer,
                "NHD",
                backend=self.decode_backend,
                use_tensor_cores=self.decode_use_tensor_cores,
            )
        ]
        # Its own for trees of drafts: the kernel that has masks, made when the first tree comes.
        self.drafts_wrapper: Any = None
        self.host_last_page_len = torch.ones(len(self.kv_last_page_len), dtype=torch.int32)

    # Metadata.

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        self.prepare_writes(forward_batch)
        if forward_batch.forward_mode.is_decode_or_idle():
            self._plan_decode(self.decode_wrappers[0], forward_batch)
            self.forward_metadata = DecodeMetadata(self.decode_wrappers)
        else:
            self._plan_chunk(forward_batch)
            self.forward_metadata = PrefillMetadata(self.prefill_wrappers_paged, True, False)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate what captured graphs read; filled anew before every replay."""
        self.allocate_captured_writes(max_num_tokens)
        longest = -(-self.max_context_len // self.shard.size)
        self.cuda_graph_kv_indices = [
            torch.zeros(max_bs * longest, dtype=torch.int32, device=self.device)
        ]

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Prepare the capture or one replay of a decode graph, in place."""
        self.prepare_captured_writes(forward_batch, in_capture)
        batch = forward_batch.batch_size
        if in_capture:
            wrapper = self._create_decode_wrappers(batch, batch)[0]
            self.decode_cuda_graph_metadata[batch] = [wrapper]
            self._plan_decode(wrapper, forward_batch)
            # It needs what the first plan has loaded.
            wrapper.begin_forward = partial(fast_decode_plan, wrapper)
            self.forward_metadata = DecodeMetadata([wrapper])
        else:
            self._plan_decode(self.decode_cuda_graph_metadata[batch][0], forward_batch)

    def _plan_decode(self, wrapper: Any, forward_batch: ForwardBatch) -> None:
        batch = forward_batch.batch_size
        on_host = forward_batch.seq_lens_cpu
        if on_host is None:
            raise RuntimeError("flashinfer plans by lengths on the host, and this batch has none")
        held = self.shard.lens(on_host[:batch]).tolist()
        indptr = _summed(held)
        rows = self._local_rows(
            forward_batch.req_pool_indices[:batch],
            self.shard.lens(forward_batch.seq_lens[:batch]),
            sum(held),
            wrapper._paged_kv_indices_buf if wrapper.is_cuda_graph_enabled else None,
        )
        planned: dict[str, Any] = {}
        if isinstance(wrapper.begin_forward, partial):
            # It leaves the buffers of the captured graph to its caller.
            planned["global_override_indptr_cpu"] = indptr
            indptr = self.kv_indptr[0][: batch + 1]
        wrapper.begin_forward(
            indptr,
            rows,
            self.host_last_page_len[:batch],
            self.heads,
            self.group_kv_heads,
            self.head_dim,
            1,
            data_type=self.flashinfer_kv_cache_dtype,
            q_data_type=self.q_dtype,
            non_blocking=True,
            **planned,
        )

    def _plan_chunk(self, forward_batch: ForwardBatch) -> None:
        """A chunk on itself, and the tokens cached before it; in a verify pass the drafts."""
        if forward_batch.forward_mode.is_target_verify():
            drafts = forward_batch.spec_info.draft_token_num
            batch = forward_batch.batch_size
            # Not the host's lengths, which for some algorithms count the drafts; packing the mask
            # waits for the device as well.
            queries, cached = [drafts] * batch, forward_batch.seq_lens.tolist()
            if self.drafts_wrapper is None:
                self.drafts_wrapper = BatchPrefillWithRaggedKVCacheWrapper(
                    self.workspace_buffer, "NHD", backend="fa2"
                )
            before, chunk = forward_batch.seq_lens, self.drafts_wrapper
            seen = visible_drafts(
                forward_batch.spec_info.custom_mask, forward_batch.seq_lens, drafts
            )
            mask = {"custom_mask": seen.flatten()}
        else:
            queries, cached = (
                forward_batch.extend_seq_lens_cpu,
                forward_batch.extend_prefix_lens_cpu,
            )
            before, chunk = forward_batch.extend_prefix_lens, self.prefill_wrapper_ragged
            mask = {}
        self.chunk_wrapper = chunk
        qo_indptr = _summed(queries)
        own = self.heads // self.shard.size
        chunk.begin_forward(
            qo_indptr,
            qo_indptr,
            own,
            self._chunk_kv_heads(own),
            self.head_dim,
            q_data_type=self.q_dtype,
            **mask,
        )
        prefix = prefixed(forward_batch)
        if prefix is None:
            return
        which = prefix.requests
        held = self.shard.lens(torch.tensor(cached[which])).tolist()
        kv_indptr = _summed(held)
        requests, lens = forward_batch.req_pool_indices[which], self.shard.lens(before[which])
        rows = self._local_rows(requests, lens, sum(held))
        self.prefill_wrappers_paged[0].begin_forward(
            _summed(queries[which]),
            kv_indptr,
            rows,
            self.host_last_page_len[: len(held)],
            self.heads,
            self.group_kv_heads,
            self.head_dim,
            1,
            q_data_type=self.q_dtype,
            kv_data_type=self.flashinfer_kv_cache_dtype,
            non_blocking=True,
        )

    def _local_rows(
        self, requests: Tensor, lens: Tensor, total: int, out: Tensor | None = None
    ) -> Tensor:
        """Rows of this rank's tokens of each request, one after the other: int32 [total].

        lens [B], how many each has, and their total, which the host knows. The device's prefix sums
        of them stand in `kv_indptr` afterwards.
        """
        rows = torch.empty(total, dtype=torch.int32, device=lens.device) if out is None else out
        indptr = self.kv_indptr[0][: len(lens) + 1]
        torch.cumsum(lens, 0, dtype=torch.int32, out=indptr[1:])
        table = self.req_to_token_pool.req_to_token
        if lens.is_cuda:
            create_triton_kv_indices_for_dcp_triton[(len(lens),)](
                table,
                requests,
                lens,
                indptr,
                None,
                rows,
                table.stride(0),
                self.shard.size,
                self.shard.rank,
            )
            return rows[:total]
        owner = torch.repeat_interleave(lens, output_size=total)
        place = torch.arange(total, device=lens.device) - indptr[owner]
        slots = table[requests[owner], place * self.shard.size + self.shard.rank]
        rows[:total] = slots // self.shard.size
        return rows[:total]

    def _chunk_kv_heads(self, own: int) -> int:
        """g: what `_own_kv_heads` keeps for so many query heads."""
        queries = torch.empty(1, own, 1, device="meta")
        keys = torch.empty(1, self.group_kv_heads, 1, device="meta")
        return self._own_kv_heads(queries, keys, keys)[0].shape[1]

    # Partial attention.

    def partial_decode(
        self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial:
        """See `ShardedAttention.partial_decode`."""
        return self._cached(self.forward_metadata.decode_wrappers[0], q, layer)

    def partial_current(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial:
        """See `ShardedAttention.partial_current`."""
        _refuse(layer)
        return self.chunk_wrapper.forward_return_lse(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            causal=not forward_batch.forward_mode.is_target_verify(),
            sm_scale=layer.scaling,
        )

    def partial_prefix(
        self,
        q: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        gathered: Tensor | None = None,
    ) -> Partial:
        """See `ShardedAttention.partial_prefix`."""
        return self._cached(self.prefill_wrappers_paged[0], q, layer, causal=False)

    def _cached(self, wrapper: Any, q: Tensor, layer: RadixAttention, **causal: bool) -> Partial:
        """Queries over this rank's rows, as the wrapper was planned."""
        _refuse(layer)
        return wrapper.forward_return_lse(
            q.contiguous(),
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            sm_scale=layer.scaling,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
            **causal,
        )


def _refuse(layer: RadixAttention) -> None:
    if layer.logit_cap > 0:
        # Plans would have to be made for it: kernels without it ignore it.
        raise NotImplementedError(
            f"layer {layer.layer_id} caps its logits, which flashinfer does not serve with "
            "--dcp-size > 1: use --attention-backend fa3 or triton"
        )


def _summed(lens: Iterable[int]) -> Tensor:
    """Prefix sums on the host, from 0: int32 [B + 1]."""
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
