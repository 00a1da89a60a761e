"""Hooks: attention backends, and MLA's way through them."""

from __future__ import annotations

from sglang_helix.hook import Hook
from sglang_helix.srt.layers.attention.adapters import ADAPTERS

_SRT = "sglang_helix.srt"

ATTENTION: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla"
        ".is_mla_dcp_lse_base_on_e",
        kind="replace",
        stage="serve",
        impl=f"{_SRT}.layers.dcp.comm:is_mla_dcp_lse_base_on_e",
        signature="attention_backend",
        why="names three backends; triton's and torch_native's LSE would be read as base 2",
        how="one table for all backends",
        upstream="sgl-project/sglang#33325",
        until="backends declare the base of their LSE",
    ),
    Hook(
        target="sglang.srt.models.deepseek_common.utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS",
        kind="append",
        stage="serve",
        impl=f"{_SRT}.layers.attention.attention_registry:absorbed_mla_backends",
        signature="",
        why="backends outside this list take a branch of MLA decode that never binds an LSE",
        how="adds the backends with an adapter",
        upstream="sgl-project/sglang#30444",
        until="upstream's Triton backend serves MLA under DCP",
    ),
    Hook(
        target="sglang.srt.models.deepseek_v2.DeepseekV2AttentionMLA.forward_prepare",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.models.deepseek_v2:forward_prepare",
        signature="self, positions, hidden_states, forward_batch, zero_allocator, "
        "input_on_attn_tp_slices=, llama_4_scaling=, prev_topk_indices=",
        why="queries that are not absorbed are not scaled by position",
        how="scales them",
        upstream="none",
        until="upstream scales queries in one place",
    ),
    Hook(
        target="sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla"
        ".DeepseekMLAForwardMixin.forward_absorb_core",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.models.deepseek_v2:forward_absorb_core",
        signature="self, q_pe, k_pe, q_nope_out, k_nope, forward_batch, zero_allocator, "
        "positions, topk_indices, llama_4_scaling, fusion_plan=, attention_output_gate=",
        why="the branch of the listed backends leaves the scaling of queries by position "
        "(Mistral-Large-3) to them, and few apply it",
        how="scales the queries; where values are projected before the exchange, attends, "
        "projects and exchanges",
        upstream="none",
        until="upstream scales queries in one place",
    ),
    Hook(
        target="sglang.srt.layers.dcp.planner.prepare_decode_context_parallel_metadata",
        kind="replace",
        stage="serve",
        impl=f"{_SRT}.layers.dcp.planner:prepare_decode_context_parallel_metadata",
        signature="seq_lens, extend_prefix_lens, extend_prefix_lens_cpu, extend_seq_lens, "
        "req_pool_indices, req_to_token, seq_lens_sum, kv_buffer_shape, kv_cache_dtype, "
        "kv_cache_device, create_chunked_prefix_cache_kv_indices_fn",
        why="reads other ranks' rows once a prefix length is not a multiple of K; Triton only",
        how="counts each request's own rows, in torch",
        upstream="sgl-project/sglang#14194",
        until="upstream's planner counts by request",
    ),
    Hook(
        target="sglang.srt.layers.attention.flashinfer_mla_backend.FlashInferMhaChunkKVRunner"
        ".forward",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.layers.attention.flashinfer_mla_backend:natural_lse",
        signature="self, q, k, v, layer, forward_batch",
        why="chunks of a prefix that one shot does not take are merged by natural LSEs, and "
        "FlashInfer's are to the base of 2: wrong answers to long prompts",
        how="makes the LSE natural; flashmla prefills by it too",
        upstream="sgl-project/sglang#35045, #40903",
        until="upstream converts or merges to the base of 2",
    ),
    Hook(
        target="sglang.srt.layers.attention.flashinfer_mla_backend.fast_mla_decode_plan",
        kind="around",
        stage="serve",
        impl=f"{_SRT}.layers.attention.flashinfer_mla_backend:plan_behind_the_last",
        signature="self, qo_indptr_cpu, kv_indptr_cpu, kv_indices, kv_len_arr_cpu, num_heads, "
        "head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type",
        why="it overwrites what the plan before may not have copied to the device yet",
        how="waits for that copy, as plans of the series' own do",
        upstream="none",
        until="upstream's plan waits, or has memory of its own",
    ),
    Hook(
        target="sglang.srt.layers.attention.trtllm_mla_backend.TRTLLMMLABackend"
        "._run_prefill_kernel",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.layers.attention.flashinfer_mla_backend:natural_lse",
        signature="self, q, k, v, layer, batch_size, cum_seq_lens_q, max_q_len, seq_lens_kv, "
        "cum_seq_lens_kv, max_kv_len, is_causal, return_lse, out_buffer, o_sf_scale=",
        why="the same of trtllm-gen's kernel, which meets every cached prefix",
        how="makes the LSE natural; cutedsl_mla prefills by it too",
        upstream="sgl-project/sglang#35045, #40903",
        until="upstream converts or merges to the base of 2",
    ),
    *(
        Hook(
            target="sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS"
            f"[{record.name}]",
            kind="backend",
            stage="serve",
            impl=f"{_SRT}.layers.attention.attention_registry:create_backend",
            signature="runner",
            why=record.why,
            how=f"the adapter in {record.own_file}",
            upstream=record.upstream,
            until=record.until,
        )
        for record in ADAPTERS
        if record.own_file
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
        kind="after",
        stage="serve",
        impl=f"{_SRT}.model_executor.model_runner:prepare_decode",
        signature="self",
        why="buffers of Triton's decode grow K times with the heads that a rank attends with, "
        "and are allocated when the pool has taken its share",
        how="allocates them before, as large as the splits need that the adapter chooses",
        upstream="none",
        until="upstream's backend chooses splits by the size of the batch",
    ),
)
