"""Arguments and environment variables of SGLang that no row of the table asks about, and why.

Everything that SGLang lets a user set is met by the series' own code (a row, a check, what ranks
compare), or stands here: with the reason why a sharded cache need not ask, or as what nobody has
looked at. What is in neither is new: ``python -m sglang_helix series`` and `test_contract.py` name
it, and whoever moves the series to that SGLang decides.

The reasons were given from an argument's declaration and help, not by reading its every use. Of
environment variables only those are asked about that SGLang reads in a module which the series
hooks, extends or calls.
"""

from __future__ import annotations

ARGUMENTS: dict[str, str] = {
    "processes, ports, threads, time-outs: nothing is computed by them": """
        base_gpu_id gpu_id_step soft_watchdog_timeout sleep_on_idle custom_sigquit_handler
        numa_node         gc_threshold nccl_port dist_timeout dist_init_addr gated_launch_port
        enable_p2p_check         pre_warm_nccl scheduler_recv_interval tokenizer_worker_num
        detokenizer_worker_num port         fastapi_root_path enable_http_worker_reuseport
        smg_grpc_mode grpc_mode grpc_port         grpc_response_timeout_secs grpc_worker_threads
        sidecar sidecar_args skip_server_warmup         warmups enable_http2
        http2_max_concurrent_streams http2_initial_connection_window_size         ssl_keyfile
        ssl_certfile ssl_ca_certs ssl_keyfile_password enable_ssl_refresh api_key
        admin_api_key engine_info_bootstrap_port file_storage_path enable_response_store
        batch_notify_size""",
    "logs, metrics, traces, dumps: they read, and only what every rank has": """
        log_level log_level_http log_requests log_requests_level log_requests_format
        log_requests_target uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost
        smg_http_sidecar_port enable_mfu_metrics enable_metrics_for_all_schedulers
        load_snapshot_publish_interval tokenizer_metrics_custom_labels_header
        tokenizer_metrics_allowed_custom_labels extra_metric_labels bucket_time_to_first_token
        bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets
        generation_tokens_buckets gc_warning_threshold_secs decode_log_interval
        enable_request_time_stats_logging load_publish_endpoint enable_forward_pass_metrics
        forward_pass_metrics_worker_id forward_pass_metrics_ipc_name enable_trace trace_modules
        otlp_traces_endpoint otlp_service_name export_metrics_to_file export_metrics_to_file_dir
        stat_loggers debug_tensor_dump_output_folder debug_tensor_dump_layers
        debug_tensor_dump_input_file msprobe_dump_config enable_layerwise_nvtx_marker
        spec_trace_dir enable_cache_report""",
    "before the model and after it: text, media, tokens, sampling": """
        random_seed mlx_enable_sampling tokenizer_path tokenizer_mode tokenizer_backend
        skip_tokenizer_init served_model_name weight_version chat_template
        trust_request_chat_template hf_chat_template_name completion_template return_input_ids
        return_output_ids reasoning_parser default_chat_template_kwargs strip_thinking_cache
        enable_strict_thinking tool_call_parser tool_server sampling_defaults
        asr_max_buffer_seconds asr_max_concurrent_sessions preferred_sampling_params
        stream_interval stream_response_default_include_usage incremental_streaming_output
        constrained_json_whitespace_pattern constrained_json_disable_any_whitespace
        constrained_json_max_whitespace_cnt enable_dynamic_batch_tokenizer
        dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout
        enable_tokenizer_batch_encode disable_tokenizer_batch_decode disable_outlines_disk_cache
        enable_custom_logit_processor enable_watermark watermark_config watermark_key
        watermark_key_b watermark_context_window watermark_mixing_probability
        watermark_max_probability watermark_default_enabled watermark_enforce_all sampling_backend
        sampling_mask_max_tokens enable_fp32_lm_head enable_multimodal mm_attention_backend
        enable_broadcast_mm_inputs_process enable_prefix_mm_cache mm_enable_dp_encoder
        mm_process_config mm_processor_worker_num mm_io_worker_num allowed_media_domains
        media_url_max_file_size_mb mm_preprocess_cache_size_mb trust_mm_content_hashes
        limit_mm_data_per_request enable_mm_global_cache image_processor_backend
        mm_global_cache_backend disable_fast_image_processor mm_feature_transport
        enable_dp_lm_head enable_tp_lm_head_all_to_all""",
    "which request runs when: never how many rows it has": """
        max_queued_requests prefill_decode_interval prefill_decode_interval_min_bs
        disable_priority_preemption default_priority_value abort_on_priority_when_disabled
        schedule_low_priority_values_first priority_scheduling_preemption_threshold
        enable_prefill_delayer prefill_delayer_max_delay_passes
        prefill_delayer_token_usage_low_watermark prefill_delayer_forward_passes_buckets
        prefill_delayer_wait_seconds_buckets prefill_delayer_queue_min_ratio
        prefill_delayer_max_delay_ms min_free_slots_delay load_balance_method
        pp_max_micro_batch_size pp_async_batch_depth""",
    "where weights come from: the loader checks what was built of them": """
        model_loader_extra_config revision model_config_parser modelopt_quant
        modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path
        quantize_and_serve startup_weight_load_mode custom_weight_loader
        weight_loader_disable_mmap         weight_loader_prefetch_checkpoints
        weight_loader_prefetch_num_threads         weight_loader_drop_cache_after_load
        remote_instance_weight_loader_seed_instance_ip
        remote_instance_weight_loader_seed_instance_service_port
        remote_instance_weight_loader_send_weights_group_ports
        remote_instance_weight_loader_backend
        remote_instance_weight_loader_start_seed_via_transfer_engine modelexpress_config
        download_dir model_checksum delete_ckpt_after_loading decrypted_config_file
        decrypted_draft_config_file checkpoint_engine_wait_weights_before_ready
        weight_cache_socket weight_cache_timeout enable_memory_saver enable_weights_cpu_backup
        enable_draft_weights_cpu_backup""",
    "experts and the FFN, over all N as in plain TP": """
        enable_tf32_matmul fp8_gemm_runner_backend fp4_gemm_runner_backend bf16_gemm_backend
        disable_flashinfer_autotune flashinfer_autotune_skip_ops moe_a2a_backend
        enable_w4a4_mxfp4_megamoe deepep_v2_mode moe_runner_backend flashinfer_mxfp4_moe_precision
        deepep_mode fuseep_mode deepep_dispatcher_output_dtype flashinfer_a2a_dispatch_type
        ep_num_redundant_experts ep_dispatch_algorithm init_expert_location enable_eplb
        eplb_algorithm eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk
        eplb_min_rebalancing_utilization_threshold expert_distribution_recorder_mode
        expert_distribution_recorder_buffer_size expert_balancedness_report_mode deepep_config
        enable_waterfill disable_flashinfer_cutlass_moe_fp4_allgather
        disable_shared_experts_fusion         enforce_shared_experts_fusion enable_paged_experts
        paged_experts_num_resident         kt_weight_path kt_method kt_cpuinfer
        kt_threadpool_count kt_num_gpu_experts         kt_max_deferred_experts_per_token
        enable_single_batch_overlap enable_fused_moe_sum_all_reduce
        enable_return_routed_experts ple_offload_embedding ple_offload_backend ple_offload_dir
        boundary_reduction enable_nccl_nvls disable_custom_all_reduce enable_mscclpp
        enable_torch_symm_mem enable_flashinfer_allreduce_fusion
        enforce_disable_flashinfer_allreduce_fusion flashinfer_allreduce_fusion_backend""",
    "what is captured, not what it computes": """
        cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_max_seq_len_prefill
        cuda_graph_bs_decode cuda_graph_bs_prefill cuda_graph_prefill_max_context
        disable_prefill_cuda_graph disable_decode_cuda_graph disable_cuda_graph
        disable_cuda_graph_padding enable_profile_cuda_graph enable_cudagraph_gc""",
    "recurrent states, which stay plain TP's": """
        mamba_backend mamba_ssm_dtype enable_mamba_cache_stochastic_rounding
        mamba_cache_philox_rounds uses_mamba_radix_cache linear_attn_backend
        linear_attn_decode_backend linear_attn_prefill_backend max_mamba_cache_size
        mamba_full_memory_ratio""",
    "how drafts are made and taken, the same on every rank": """
        speculative_draft_model_path speculative_draft_model_revision
        speculative_draft_load_format         speculative_accept_threshold_single
        speculative_accept_threshold_acc         speculative_use_block_verification
        speculative_token_map speculative_draft_window_size         speculative_draft_sink_size
        speculative_moe_runner_backend speculative_moe_a2a_backend
        speculative_enable_w4a4_mxfp4_megamoe speculative_draft_model_quantization
        _speculative_draft_quantization_explicitly_set speculative_ngram_min_bfs_breadth
        speculative_ngram_max_bfs_breadth speculative_ngram_match_type
        speculative_ngram_max_trie_depth speculative_ngram_capacity
        speculative_ngram_external_corpus_path speculative_ngram_external_sam_budget
        speculative_ngram_external_corpus_max_tokens""",
    "of a feature, a model or a machine that has a row of its own": """
        enable_lora_overlap_loading max_lora_rank lora_target_modules max_loaded_loras
        max_loras_per_batch lora_eviction_policy lora_backend max_lora_chunk_size
        experts_shared_outer_loras lora_use_virtual_experts lora_strict_loading
        lora_drain_wait_threshold _radix_eviction_policy_explicitly_set
        radix_eviction_policy_config         hicache_host_memory_mode hicache_ratio hicache_size
        hicache_host_memory_fraction         hicache_write_policy hicache_io_backend
        hicache_mem_layout hicache_storage_prefetch_policy
        hicache_storage_backend_extra_config hicache_storage_prefetch_retry_poll_interval
        hicache_storage_prefetch_retry_max_attempts unified_cache_external_linker_backend
        unified_cache_external_linker_config enable_linker_mla_dedup hisparse_config
        lmcache_config_file flexkv_config_file dllm_algorithm_config dllm_fdfo
        tbo_token_distribution_threshold offload_num_in_group offload_prefetch_step offload_mode
        disaggregation_bootstrap_port disaggregation_ib_device
        disaggregation_decode_enable_radix_cache disaggregation_decode_host_receive_threshold
        disaggregation_decode_retraction_backup disaggregation_decode_polling_interval
        pdmux_config_path sm_group_num
        kv_canary_real_data kv_canary_sweep_interval         enable_prefill_cp cp_strategy
        enable_cp_tp_group_sharing enable_cp_decode_attn_tp         enable_dsa_cache_layer_split
        dsa_prefill_backend dsv4_prefill_backend dsa_triton_union         dsa_decode_backend
        dsv4_attn_backend dsa_paged_mqa_logits_backend dsa_topk_backend
        enable_deepseek_v4_fp4_indexer enable_dsa_fused_indexer enable_return_indexer_topk
        qsa_indexer_dtype c128_page_size swa_prefix_tails enable_encoder_swa_bounded_replay
        enable_decoder_swa_bounded_replay speculative_dsa_topk_backend uno_lora_path
        speculative_dflash_block_size speculative_domino_candidate_pool_size
        speculative_dspark_block_size speculative_dspark_sps_table_path
        speculative_dspark_confidence_sts_path
        speculative_dspark_align_verify_tokens_to_graph_tier speculative_adaptive_config
        enable_elastic_expert_backup mooncake_ib_device ep_join_mode elastic_ep_scale_timeout
        ep_join_rank_offset elastic_ep_initial_size max_ep_size int8_mamba_ckpt_size
        linear_replayssm_cache_len enable_megamoe_for_layernorm_sp
        _swa_full_tokens_ratio_explicitly_set         disable_hybrid_swa_memory
        enable_torch_compile_debug_mode torch_compile_max_bs
        triton_attention_split_tile_size enable_aiter_allreduce_fusion
        disable_aiter_allreduce_fusion_in_prefill disable_aiter_allreduce_fusion_in_decode
        enable_amd_monokernel enable_dp_attention_local_control_broadcast enable_scattered_sconv
        triton_attention_num_kv_splits""",
}

#: Arguments that nobody has looked at.
ARGUMENTS_NOT_SEEN = """
    decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank
    decoupled_spec_role disaggregation_decode_allocation_policy
    num_reserved_decode_tokens disaggregation_decode_extra_slots optimistic_prefill_attempts
    encoder_only language_only language_model_only encoder_transfer_backend encoder_urls
    encoder_bootstrap_port encoder_register_urls enable_adaptive_dispatch_to_encoder
    enable_return_hidden_states return_hidden_states_mode enable_return_aux_hidden_states
    aux_hidden_state_capture return_aux_hidden_state_layer_ids enable_lean_attention
    prefill_kv_cache_dequant_dtype triton_attention_reduce_in_fp32 flashinfer_mla_disable_ragged
    enable_fused_qk_norm_rope enable_precise_embedding_interpolation mamba_max_states_per_path
    mamba_track_interval linear_attn_verify_backend enable_quant_communications
    rl_on_policy_target     is_embedding model_impl quantization_param_path rl_quant_profile
    kv_events_config forward_hooks     moe_dp_size dwdp_size enable_attn_tp_input_scattered
    enable_shared_experts_attn_tp     shared_experts_tp_size enable_dense_mlp_attn_tp
    disable_attn_tp_gather moe_dense_tp_size     prefill_only_disable_kv_cache
    disable_chunked_prefix_cache speculative_boundary_reduction
    speculative_draft_kv_cache_dtype"""

VARIABLES: dict[str, str] = {
    "processes, ports, threads, time-outs, logs: nothing is computed by them": """
        SGLANG_DETECT_SLOW_RANK SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE
        SGLANG_FORCE_CONFIDENTIAL_COMPUTE         SGLANG_IS_FLASHINFER_AVAILABLE
        SGLANG_KILLPG_ON_SCHEDULER_EXCEPTION         SGLANG_LOG_EXPERT_LOCATION_METADATA
        SGLANG_ENABLE_CUDA_GRAPH_CAPTURE_TRACE SGLANG_GRAPH_BATCH_CAPTURE
        SGLANG_LOG_DECODE_GRAPH_KEY SGLANG_LOG_GC SGLANG_LOG_MS SGLANG_LOG_PICKLE_IPC_OBJECTS
        SGLANG_MORI_RECV_BOUND
        SGLANG_NUMA_BIND_V2         SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS
        SGLANG_REQ_RUNNING_TIMEOUT SGLANG_REQ_WAITING_TIMEOUT         SGLANG_ROLE_NAMESPACES
        SGLANG_ROLE_NAMESPACES_OUT SGLANG_SCHEDULER_MAX_RECV_PER_POLL
        SGLANG_SET_CPU_AFFINITY SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK SGLANG_TCP_STORE_PORT
        SGLANG_TIMEOUT_KEEP_ALIVE SGLANG_TRACE_LOGITS_E2E SGLANG_TRACE_LOGITS_E2E_SYNC
        SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE SGLANG_USE_MESSAGE_QUEUE_BROADCASTER
        SGLANG_PLUGINS SGLANG_USE_PICKLE_IPC SGLANG_DEBUG_MEMORY_POOL
        SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK
        SGLANG_MEMORY_SAVER_CUDA_GRAPH SGLANG_ENABLE_ASYNC_ASSERT
        SGLANG_ENABLE_TORCH_INFERENCE_MODE""",
    "checks of SGLang's own, which may stop a server and change no answer": """
        SGLANG_CHECK_KV_PAGE_INVARIANTS SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY
        SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK
        SGLANG_VALIDATE_MAMBA_REPLAY_STATE_INDICES SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE
        SGLANG_KV_CANARY_ENABLE_VERIFY_TOKEN_ASSERT""",
    "of SGLang's own tests": """
        SGLANG_TEST_RETRACT SGLANG_TEST_RETRACT_INTERVAL SGLANG_TEST_RETRACT_NO_PREFILL_BS
        SGLANG_TEST_SCRIPTED_RUNTIME SGLANG_TEST_STUCK_DP_CONTROLLER
        SGLANG_TEST_STUCK_SCHEDULER_INIT         SGLANG_SIMULATE_ACC_LEN
        SGLANG_SIMULATE_ACC_METHOD SGLANG_SIMULATE_ACC_TOKEN_MODE
        SGLANG_TEST_RAGGED_VERIFY_FORCE_UNIFORM_CAPTURE""",
    "before the model and after it, and where weights come from": """
        SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN SGLANG_CPU_QUANTIZATION
        SGLANG_EMBEDDINGS_SPARSE_HEAD         SGLANG_EXTERNAL_MM_MODEL_ARCH
        SGLANG_MAX_NEW_TOKENS_LIMIT SGLANG_MM_FEATURE_CACHE_MB
        SGLANG_RETURN_ORIGINAL_LOGPROB SGLANG_SORT_WEIGHT_FILES SGLANG_USE_MODELSCOPE
        SGLANG_VLM_CACHE_SIZE_MB SGLANG_OPT_USE_GUMBEL_SAMPLE SGLANG_ROPE_CACHE_ALIGN
        SGLANG_ROPE_CACHE_SAFETY_MARGIN SGLANG_SPEC_EXPANSION_SAFETY_FACTOR""",
    "which request runs when: never how many rows it has": """
        SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION SGLANG_DISABLE_CONSECUTIVE_PREFILL_OVERLAP
        SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION SGLANG_ENABLE_WAITING_PREFIX_REFRESH
        SGLANG_PREFILL_DELAYER_MAX_PREFILL_BS_WINDOW_SIZE SGLANG_RADIX_FORCE_MISS""",
    "experts and the FFN, over all N as in plain TP": """
        SGLANG_BLACKWELL_OVERLAP_SHARED_EXPERTS_OUTSIDE_SBO SGLANG_DEEPEP_BF16_DISPATCH
        SGLANG_DP_USE_REDUCE_SCATTER SGLANG_ENABLE_BF16_SPLITK_GEMM
        SGLANG_FLASHINFER_CUTEDSL_NVFP4_W4A16 SGLANG_FLASHINFER_NUM_MAX_DISPATCH_TOKENS_PER_RANK
        SGLANG_MOE_DEFERRED_FINALIZE_MAX_TOKENS SGLANG_NVFP4_CKPT_FP8_NEXTN_MOE
        SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED SGLANG_OPT_MOE_QUANT_ONCE SGLANG_SHARED_EXPERT_TP1
        SGLANG_ENABLE_PCG_DSV2_DUAL_STREAM SGLANG_USE_AITER_MOE_GU_ITLV
        SGLANG_MOE_NVFP4_DISPATCH SGLANG_MOE_PADDING SGLANG_MORI_EP_V2""",
    "recurrent states, which stay plain TP's": """
        SGLANG_DISABLE_FUSED_MAMBA_SLOT_OPS SGLANG_OPT_MAMBA_SKIP_DECODE_LOCK""",
    "of a feature, a model or a machine that has a row of its own": """
        SGLANG_HICACHE_FILE_BACKEND_ENABLE_METADATA_CACHE SGLANG_HICACHE_FILE_BACKEND_METADATA_TTL
        SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY
        SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE
        SGLANG_AITER_HONOR_EXPLICIT_MEM_FRACTION SGLANG_AITER_KV_CACHE_LAYOUT
        SGLANG_AITER_MEGA_RANK_SYNC SGLANG_DETERMINISTIC_NCCL_NCHANNELS
        SGLANG_DISABLE_LAZY_COMPACTION         SGLANG_DISABLE_M3_FP8_ATTN_GEMM
        SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER
        SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL
        SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT
        SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL
        SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE SGLANG_DISAGGREGATION_QUEUE_SIZE
        SGLANG_DISAGGREGATION_THREAD_POOL_SIZE SGLANG_DISAGGREGATION_WAITING_TIMEOUT
        SGLANG_DISAGGREGATION_ZMQ_MAX_SOCKETS SGLANG_DISAGGREGATION_ZMQ_SEND_TIMEOUT
        SGLANG_DSA_FUSE_TOPK SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD
        SGLANG_OPT_DSV41_TARGET_METADATA_EARLY SGLANG_OPT_DSV41_TARGET_VERIFY_METADATA_GLUE
        SGLANG_OPT_SKIP_GLUED_REPLAY_VIEW
        SGLANG_DSV4_COMPRESS_STATE_DTYPE SGLANG_DSV4_FP4_DEQUANT SGLANG_DSV4_FP4_EXPERTS
        SGLANG_DSV4_KV_LAYOUT SGLANG_DSV4_UNIFIED_KV_FP8 SGLANG_ENABLE_DETERMINISTIC_INFERENCE
        SGLANG_ENABLE_DSA_Q8KV8_BORN_FP8_Q SGLANG_ENABLE_DSA_Q8KV8_QPREP_OVERLAP
        SGLANG_ENABLE_FAILED_SESSION_PROBE SGLANG_ENABLE_KV_SHARD_ZERO_SM_GATHER
        SGLANG_ENABLE_SPLITKV_VERIFY SGLANG_EXACT_CHUNK_FILL SGLANG_EXPERIMENTAL_LORA_OPTI
        SGLANG_EXPERIMENTAL_ONLINE_C128_MTP SGLANG_FAILED_SESSION_IDLE_TIMEOUT_S
        SGLANG_FAILED_SESSION_PROBE_INTERVAL_S SGLANG_FAILED_SESSION_PROBE_MAX_INTERVAL_S
        SGLANG_FP8_PAGED_MQA_LOGITS_TORCH SGLANG_HIP_FFN_NORM_MXFP8 SGLANG_HIP_SHARED_ACT_MXFP8
        SGLANG_MLA_DECODE_TUNE SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD SGLANG_NPU_USE_MULTI_STREAM
        SGLANG_NPU_W4A4_NEW_PACKING SGLANG_OPT_DEEPGEMM_HC_PRENORM SGLANG_OPT_FUSE_MHC_POST_PRE
        SGLANG_OPT_INKLING_MXFP8_FUSED_QUANT_STORE SGLANG_OPT_MINIMAX_M3_FP8_INDEX_CACHE
        SGLANG_OPT_USE_AITER_INDEXER SGLANG_OPT_USE_JIT_INDEXER_METADATA
        SGLANG_OPT_USE_MINIMAX_FUSED_KV_INDEX_STORE SGLANG_OPT_USE_MULTI_STREAM_OVERLAP
        SGLANG_OPT_USE_ONLINE_COMPRESS SGLANG_OPT_USE_TILELANG_INDEXER
        SGLANG_OPT_USE_TILELANG_MHC_POST         SGLANG_OPT_USE_TILELANG_MHC_PRE
        SGLANG_OPT_USE_TOPK_V2 SGLANG_OPT_SM120_DIRECT_SWA_KV         SGLANG_PREFILL_TILE_BUDGET
        SGLANG_PREFILL_TILE_BUDGET_MODE SGLANG_ROCM_DISABLE_LINEARQUANT
        SGLANG_ROCM_USE_MULTI_STREAM SGLANG_USE_1STAGE_ALLREDUCE SGLANG_USE_AITER
        SGLANG_USE_AITER_AG         SGLANG_USE_AG_AFTER_QLORA SGLANG_ZBAL_LOCAL_MEM_SIZE
        SGLANG_TRITON_FP8_PREFILL_ATTN""",
}

#: Variables that nobody has looked at.
VARIABLES_NOT_SEEN = """
    SGLANG_DISABLE_LEAN_ATTENTION SGLANG_FORCE_LEAN_GRID_CU_MULT
    SGLANG_OPT_CUDA_GRAPH_FILL_FAST_PATH SGLANG_OPT_DSV41_DSPARK_DRAFT_PREP_FORK
    SGLANG_OPT_DSV41_DSPARK_SKIP_PREFILLED_INPUTS
    SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE
    SGLANG_DISAGG_STAGING_POOL_SIZE_MB SGLANG_STAGING_USE_TORCH SGLANG_EAGER_INPUT_NO_COPY
    SGLANG_ENABLE_COLOCATED_BATCH_GEN     SGLANG_ENABLE_DISAGG_SAMPLING_MASK
    SGLANG_ENABLE_POST_CAPTURE_KV_SIZING SGLANG_ENABLE_PP_SPEC
    SGLANG_ENABLE_PREFILL_WAR_READ_DONE SGLANG_ENABLE_TORCH_COMPILE SGLANG_ENABLE_WAR_BARRIER
    SGLANG_FLASHINFER_DECODE_SPLIT_TILE_SIZE SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE
    SGLANG_FLASHINFER_USE_PAGED SGLANG_FLASHINFER_WORKSPACE_SIZE SGLANG_FORCE_COARSE_WAR_BARRIER
    SGLANG_MOONCAKE_CUSTOM_MEM_POOL SGLANG_MOONCAKE_MAX_TRANSFER_BATCH_INDICES
    SGLANG_MOONCAKE_SEND_AUX_TCP SGLANG_NATIVE_MOVE_KV_CACHE SGLANG_NVFP4_CKPT_FP8_GEMM_IN_ATTN
    SGLANG_OPT_FLASHINFER_DRAFT_HOST_INDPTR SGLANG_OPT_FLASHINFER_VERIFY_HOST_PLAN
    SGLANG_OPT_FP8_WO_A_GEMM SGLANG_RAGGED_VERIFY_MODE SGLANG_RUST_SERVER
    SGLANG_SCHEDULER_SKIP_ALL_GATHER SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR
    SGLANG_SWA_EVICTION_INTERVAL SGLANG_TRITON_DECODE_ATTN_STATIC_KV_SPLITS
    SGLANG_TRITON_DECODE_SPLIT_TILE_SIZE SGLANG_TRITON_DENSE_PREFILL_ATTN"""


def listed(reasons: dict[str, str], not_seen: str) -> list[str]:
    """Every name of a list, with and without a reason."""
    return " ".join([*reasons.values(), not_seen]).split()
