"""Adapter for FlashInfer with GQA and MHA. Extends `layers/attention/flashinfer_backend.py`.

MLA with FlashInfer is complete upstream. Here decode and the cached prefix are planned with the
heads of the whole KVP group over this rank's rows, in pages of one token as upstream does, and the
chunk with this rank's own heads. Drafts see all of a prefix, and decode it as more heads of their
request. Every plan is made of lengths that the host knows, so that none waits for the device. LSEs
are base 2, [T, heads]; a request without tokens gets 0 and -inf.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, fast_decode_plan
from sglang.srt.layers.attention.flashinfer_backend import (
    DecodeMetadata,
    FlashInferAttnBackend,
    PrefillMetadata,
    should_use_tensor_core,
)
from sglang.srt.runtime_context import get_spec
from torch import Tensor

from sglang_helix.srt.layers.attention.drafts import Drafted
from sglang_helix.srt.layers.attention.flashinfer_plans import lens_on_host, planned
from sglang_helix.srt.layers.attention.prefixes import prefixed, summed_on_host
from sglang_helix.srt.layers.attention.sharded import ShardedAttention
from sglang_helix.srt.layers.dcp.partial import Masked, Partial

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


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
            self.flashinfer_kv_cache_dtype,
            self.heads * (get_spec().speculative_num_draft_tokens or 1),
            self.group_kv_heads,
        )
        self.decode_wrappers = [
            BatchDecodeWithPagedKVCacheWrapper(
                self.workspace_buffer,
                "NHD",
                backend=self.decode_backend,
                use_tensor_cores=self.decode_use_tensor_cores,
            )
        ]
        self.host_last_page_len = torch.ones(len(self.kv_last_page_len), dtype=torch.int32)

    # Metadata.

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare one eager forward pass."""
        self.prepare_writes(forward_batch)
        self.prepare_drafts(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_decode_or_idle() or mode.is_target_verify():
            self._plan_decode(self.decode_wrappers[0], forward_batch)
            self.forward_metadata = DecodeMetadata(self.decode_wrappers)
        else:
            self._plan_chunk(forward_batch)
            self.forward_metadata = PrefillMetadata(self.prefill_wrappers_paged, True, False)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any) -> None:
        """Allocate what captured graphs read; filled anew before every replay."""
        self.allocate_captured_writes(max_num_tokens)
        self.allocate_captured_drafts(max_bs, max_num_tokens)
        longest = -(-self.max_context_len // self.shard.size)
        self.cuda_graph_kv_indices = [
            torch.zeros(max_bs * longest, dtype=torch.int32, device=self.device)
        ]

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Prepare the capture or one replay of a decode graph, in place."""
        self.prepare_captured_drafts(forward_batch, in_capture)
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
        """One query of each request over its cached tokens, its drafts as heads of it."""
        batch = forward_batch.batch_size
        drafts = self.drafts if forward_batch.forward_mode.is_target_verify() else 1
        held, rows = self.held_rows(
            forward_batch.req_pool_indices[:batch],
            forward_batch.seq_lens[:batch],
            lens_on_host(forward_batch),
            self.kv_indptr[0],
            wrapper._paged_kv_indices_buf if wrapper.is_cuda_graph_enabled else None,
        )
        indptr = summed_on_host(held)
        captured: dict[str, Any] = {}
        if isinstance(wrapper.begin_forward, partial):
            # It leaves the buffers of the captured graph to its caller.
            captured["global_override_indptr_cpu"] = indptr
            indptr = self.kv_indptr[0][: batch + 1]
        self._plan(
            wrapper,
            *(indptr, rows, self.host_last_page_len[:batch]),
            *(self.heads * drafts, self.group_kv_heads, self.head_dim, 1),
            data_type=self.flashinfer_kv_cache_dtype,
            non_blocking=True,
            **captured,
        )

    def _plan_chunk(self, forward_batch: ForwardBatch) -> None:
        """A chunk on itself, and the tokens cached before it."""
        queries = forward_batch.extend_seq_lens_cpu
        qo_indptr = summed_on_host(queries)
        own = self.heads // self.shard.size
        self._plan(
            self.prefill_wrapper_ragged,
            *(qo_indptr, qo_indptr, own, self._chunk_kv_heads(own), self.head_dim),
        )
        prefix = prefixed(forward_batch)
        if prefix is None:
            return
        which = prefix.requests
        held, rows = self.held_rows(
            forward_batch.req_pool_indices[which],
            forward_batch.extend_prefix_lens[which],
            torch.tensor(forward_batch.extend_prefix_lens_cpu[which]),
            self.kv_indptr[0],
        )
        self._plan(
            self.prefill_wrappers_paged[0],
            *(summed_on_host(queries[which]), summed_on_host(held)),
            *(rows, self.host_last_page_len[: len(held)]),
            *(self.heads, self.group_kv_heads, self.head_dim, 1),
            kv_data_type=self.flashinfer_kv_cache_dtype,
            non_blocking=True,
        )

    def _plan(self, wrapper: Any, *args: Any, **kwargs: Any) -> None:
        with planned(wrapper, self.device):
            wrapper.begin_forward(*args, q_data_type=self.q_dtype, **kwargs)

    def _chunk_kv_heads(self, own: int) -> int:
        """g: what `_own_kv_heads` keeps for so many query heads."""
        queries = torch.empty(1, own, 1, device="meta")
        keys = torch.empty(1, self.group_kv_heads, 1, device="meta")
        return self._own_kv_heads(queries, keys, keys)[0].shape[1]

    # Partial attention.

    def partial_decode(
        self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial | Masked:
        """See `ShardedAttention.partial_decode`."""
        return self._decoded(q, layer)

    def partial_current(
        self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, forward_batch: ForwardBatch
    ) -> Partial:
        """See `ShardedAttention.partial_current`."""
        _refuse(layer)
        if forward_batch.forward_mode.is_target_verify():
            return self.attend_drafts(q, k, v, layer)
        out, lse = self.prefill_wrapper_ragged.forward_return_lse(
            q.contiguous(), k, v, causal=True, sm_scale=layer.scaling
        )
        return Partial(out, lse)

    def partial_prefix(
        self,
        q: Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        gathered: Tensor | None = None,
    ) -> Partial | Drafted:
        """See `ShardedAttention.partial_prefix`."""
        if forward_batch.forward_mode.is_target_verify():
            decode = partial(self._decoded, layer=layer)
            return self.as_heads(decode, q, self.group_kv_heads)
        return self._cached(self.prefill_wrappers_paged[0], q, layer, causal=False)

    def _decoded(self, q: Tensor, layer: RadixAttention) -> Partial:
        return self._cached(self.forward_metadata.decode_wrappers[0], q, layer)

    def _cached(self, wrapper: Any, q: Tensor, layer: RadixAttention, **causal: bool) -> Partial:
        """Queries over this rank's rows, as the wrapper was planned."""
        _refuse(layer)
        out, lse = wrapper.forward_return_lse(
            q.contiguous(),
            self.token_to_kv_pool.get_kv_buffer(layer.layer_id),
            sm_scale=layer.scaling,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
            **causal,
        )
        return Partial(out, lse)


def _refuse(layer: RadixAttention) -> None:
    if layer.logit_cap > 0:
        # Plans would have to be made for it: kernels without it ignore it.
        raise NotImplementedError(
            f"layer {layer.layer_id} caps its logits, which flashinfer does not serve with "
            "--dcp-size > 1: use --attention-backend fa3 or triton"
        )
