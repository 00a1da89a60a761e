"""The patch series as data: every place where it touches SGLang, and why.

One declaration serves four readers: `plugin.py` installs it, ``python -m sglang_helix series``
prints and checks it, the contract test runs the same check, and whoever carries the series to the
next SGLang reads here what each hook is for and when it can go.
"""

from __future__ import annotations

from collections.abc import Iterator

from sglang_helix.hook import Field, Hook, Patch, Stage
from sglang_helix.srt.layers.attention.adapters import ADAPTERS

_SRT = "sglang_helix.srt"
_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"

A2A = Patch(
    "a2a",
    "Decode context parallelism over one exchange interface, for every attention backend that has "
    "an adapter, GQA and MLA",
    (
        Hook(
            target="sglang.srt.arg_groups.parallel_hook.handle_deprecated_dp_attention",
            kind="resolution",
            stage="launch",
            impl="sglang_helix.plugin:verify_series",
            signature="server_args",
            why="SGLang logs a hook that could not be applied and starts without it",
            how="first step of resolution: stops unless every launch hook was applied",
            upstream="none",
            until="SGLang stops on a failed hook by itself",
        ),
        Hook(
            target="sglang.srt.arg_groups.parallel_hook.handle_decode_context_parallelism",
            kind="resolution",
            stage="launch",
            impl=f"{_SRT}.server_args:resolve_comm_backend",
            signature="server_args",
            why="heads that cannot be laid out start and answer wrongly; on Blackwell the default "
            "fi_a2a is ignored for GQA",
            how="checks N, K and heads after upstream's step; a2a where fi_a2a does not exist",
            upstream="sgl-project/sglang#34355",
            until="upstream validates the heads of GQA under DCP",
        ),
        Hook(
            target="sglang.srt.arg_groups.attention_hook.handle_attention_backend_compatibility",
            kind="resolution",
            stage="launch",
            impl=f"{_SRT}.server_args:choose_attention_backend",
            signature="server_args",
            why="the default backend on Hopper (fa3) has no DCP and dies at graph capture",
            how="where the series serves, chooses a backend that works if the user named none, and "
            "says so",
            upstream="sgl-project/sglang#35384, #39440",
            until="upstream's default takes dcp_size into account",
        ),
        Hook(
            target="sglang.srt.arg_groups.model_hook.handle_model_capability_adjustments",
            kind="resolution",
            stage="launch",
            impl=f"{_SRT}.server_args:validate",
            signature="server_args",
            why="many combinations with DCP start and then crash or answer wrongly",
            how="walks the compatibility table once everything else is resolved",
            upstream="sgl-project/sglang#37735, #29760, #34355",
            until="upstream refuses the same combinations",
        ),
        Hook(
            target="sglang.srt.server_args.ServerArgs.check_server_args",
            kind="after",
            stage="launch",
            impl=f"{_SRT}.server_args:check_launch",
            signature="self",
            why="arguments resolved before plugins were loaded have met no step of the series",
            how="validates what is about to be launched; says in the log what SGLang serves alone",
            upstream="none",
            until="SGLang loads plugins before any resolution",
        ),
        Hook(
            target="sglang.srt.distributed.bootstrap.init_parallel_runtime",
            kind="before",
            stage="launch",
            impl="sglang_helix.helix:before_process_groups",
            signature="server_args, device, dist_port",
            why="attention backends and models are too heavy to import in every process",
            how="validates again; installs the serve stage in scheduler processes where the series "
            "serves",
            upstream="none",
            until="SGLang's plugins can register hooks for scheduler processes alone",
        ),
        Hook(
            target="sglang.srt.distributed.parallel_state.init_distributed_environment",
            kind="after",
            stage="launch",
            impl=f"{_SRT}.distributed.agreement:agree",
            signature="world_size=, rank=, distributed_init_method=, local_rank=, backend=, "
            "timeout=, moe_a2a_backend=, recovered_rank=, max_world_size=",
            why="each launcher hears from its own node's ranks; a node with another version, "
            "exchange or page size hangs the others, or makes answers wrong",
            how="all ranks say what they run through the store and go on only when it is the same",
            upstream="none",
            until="SGLang compares the nodes of a server",
        ),
        Hook(
            target="sglang.srt.managers.scheduler.Scheduler.get_init_info",
            kind="after",
            stage="launch",
            impl=f"{_SRT}.managers.scheduler:add_series_report",
            signature="self",
            why="a rank whose plugin failed would serve upstream's DCP, with wrong tokens",
            how="adds this rank's series and layout to its ready message",
            upstream="none",
            until="SGLang reports the plugins of each rank",
        ),
        Hook(
            target="sglang.srt.managers.data_parallel_controller.DataParallelController"
            ".get_init_info",
            kind="after",
            stage="launch",
            impl=f"{_SRT}.managers.data_parallel_controller:add_series_reports",
            signature="self",
            why="see Scheduler.get_init_info; the controller passes on one rank's numbers only",
            how="adds the reports of all ranks to the controller's ready message",
            upstream="none",
            until="see Scheduler.get_init_info",
        ),
        Hook(
            target="sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
            kind="around",
            stage="launch",
            impl=f"{_SRT}.entrypoints.engine:launch_scheduler_processes",
            signature="server_args, port_args, run_scheduler_process_func, placement_group=",
            why="see Scheduler.get_init_info",
            how="waits for the ranks' reports and refuses to serve unless all agree",
            upstream="none",
            until="SGLang reports the plugins of each rank",
        ),
        Hook(
            target="sglang.srt.distributed.parallel_state.initialize_model_parallel",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.distributed.parallel_state:initialize_model_parallel",
            signature="backend=, duplicate_tp_group=, enable_symm_mem=, recovered_rank=, "
            "rank_offset=, max_world_size=",
            why="upstream builds its DCP group on CUDA, HIP, NPU and XPU only",
            how="builds the same group where upstream refuses the platform",
            upstream="sgl-project/sglang#26432",
            until="the platform gate goes",
        ),
        Hook(
            target="sglang.srt.distributed.parallel_state.GroupCoordinator.all_to_all_single",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.distributed.all_to_all:group_all_to_all_single",
            signature="self, output, input",
            why="equal splits only, no check of its arguments, no CPU tensors",
            how="validated, uneven splits, any dtype, gloo, one custom op",
            upstream="sgl-project/sglang#21637",
            until="upstream's takes splits and checks its arguments",
        ),
        Hook(
            target="sglang.srt.distributed.device_communicators.pynccl.PyNcclCommunicator"
            ".all_to_all_single",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.distributed.device_communicators.pynccl:pynccl_all_to_all_single",
            signature="self, output_tensor, input_tensor",
            why="right for one dimension only; leaves the output unset when disabled",
            how="bytes, any shape and split, ncclAlltoAll where the library has it",
            upstream="sgl-project/sglang#32560",
            until="upstream's does the same",
        ),
        Hook(
            target="sglang.srt.layers.dcp.comm.dcp_a2a_lse_reduce",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.layers.dcp.comm:dcp_a2a_lse_reduce",
            signature="cp_attn_out, cp_attn_lse, cp_group, is_lse_base_on_e=, "
            "cuda_graph_buffers=, comm_backend=",
            why="an empty shard's NaN reaches the result; 4-byte rows; power-of-two sizes only",
            how="the series' exchange; fi_a2a stays upstream's",
            upstream="sgl-project/sglang#34614",
            until="upstream's combine masks empty shards",
        ),
        Hook(
            target="sglang.srt.layers.dcp.comm.cp_lse_ag_out_rs_mha",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.layers.dcp.comm:cp_lse_ag_out_rs_mha",
            signature="cp_attn_out, cp_attn_lse, cp_group, return_lse=",
            why="all-reduces what it then slices; a +inf LSE zeroes every rank's share",
            how="the series' exchange: a true reduce-scatter",
            upstream="sgl-project/sglang#25090",
            until="upstream's reduce-scatters and masks",
        ),
        Hook(
            target="sglang.srt.layers.dcp.comm.cp_lse_ag_out_rs_mla",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.layers.dcp.comm:cp_lse_ag_out_rs_mla",
            signature="cp_attn_out, cp_attn_lse, cp_group, ctx=, is_lse_base_on_e=",
            why="an empty shard's NaN is spread to all ranks; power-of-two sizes only",
            how="the series' exchange",
            upstream="sgl-project/sglang#14194",
            until="upstream's masks empty shards",
        ),
        Hook(
            target="sglang.srt.layers.dcp.comm.all_gather_q_for_mla_decode",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.layers.dcp.comm:all_gather_q_for_mla_decode",
            signature="q_nope_out, q_pe",
            why="gathers the rope part in front of the latent, which kernels that take both as one "
            "want behind it: a copy of all heads' queries in each layer",
            how="gathers them in that order, and returns views",
            upstream="none",
            until="upstream's gathers the latent first",
        ),
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
            target="sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla"
            ".DeepseekMLAForwardMixin.forward_absorb_core",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.models.deepseek_v2:forward_absorb_core",
            signature="self, q_pe, k_pe, q_nope_out, k_nope, forward_batch, zero_allocator, "
            "positions, topk_indices, llama_4_scaling, fusion_plan=, attention_output_gate=",
            why="the branch of the listed backends leaves the scaling of queries by position to "
            "them, which the one for all others applies",
            how="scales the queries of an adapter that the series appended to the list; where "
            "values are projected before the exchange, attends, projects and exchanges",
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
        Hook(
            target="sglang.srt.layers.linear.QKVParallelLinear.__init__",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.layers.linear:qkv_parallel_linear_init",
            signature="self, hidden_size, head_size, total_num_heads, total_num_kv_heads=, bias=, "
            "skip_bias_add=, params_dtype=, quant_config=, prefix=, load_presharded_attn=, "
            "v_head_size=, skip_block_quant_check=, parallel_group=, kv_parallel_group=",
            why="ranks of a KVP group would compute different key-value heads",
            how="shards key-value heads by A while the model is built",
            upstream="sgl-project/sglang#34355",
            until="upstream's models shard key-value heads by tp / dcp",
        ),
        Hook(
            target="sglang.srt.model_loader.loader._initialize_model",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.model_loader.loader:initialize_model",
            signature="model_config, load_config, quant_config=",
            why="see QKVParallelLinear",
            how="sets the scope, then fits and checks every attention layer, or refuses the model",
            upstream="sgl-project/sglang#34355",
            until="see QKVParallelLinear",
        ),
        Hook(
            target="sglang.srt.model_executor.model_runner_components.weight_exporter"
            ".WeightExporter.get_weights_by_name",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.model_executor.weight_exporter:get_weights_by_name",
            signature="self, name, truncate_size=",
            why="cuts keys and values out of the joint projection by N: other matrices' rows",
            how="asks the projection for the rows that it holds",
            upstream="none",
            until="upstream's models ask their projections",
        ),
        Hook(
            target="sglang.srt.models.utils.enable_fused_set_kv_buffer",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.models.utils:enable_fused_set_kv_buffer",
            signature="forward_batch",
            why="the fused rotary kernel writes K and V at widened slots, out of the pool's bounds",
            how="keeps the two steps apart",
            upstream="none",
            until="the fused kernel resolves the owner of a slot",
        ),
        Hook(
            target="sglang.srt.mem_cache.memory_pool.MLATokenToKVPool.set_kv_buffer",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.mem_cache.memory_pool:mla_set_kv_buffer",
            signature="self, layer, loc_info, cache_k, cache_v, layer_id_override=",
            why="asserts under DCP, but MLA's prefill writes through it on other platforms",
            how="splits the row and goes through the store that resolves owners",
            upstream="sgl-project/sglang#37735",
            until="upstream's write path is the same on every platform",
        ),
        *(
            Hook(
                target=f"sglang.srt.mem_cache.memory_pool.{pool}.move_kv_cache",
                kind="around",
                stage="serve",
                impl=f"{_SRT}.mem_cache.memory_pool:move_kv_cache",
                signature="self, tgt_loc, src_loc",
                why="accepted draft tokens move to slots that another rank may own, and widened "
                "slots are beyond the end of a sharded pool",
                how="gathers the rows from their owners and writes them to the new owners; a "
                "draft's pool, which is whole, moves its own",
                upstream="none",
                until="upstream moves rows under DCP",
            )
            for pool in ("MHATokenToKVPool", "MLATokenToKVPool")
        ),
        Hook(
            target="sglang.srt.arg_groups.hicache_hook.resolve_hicache_dcp_compatibility",
            kind="around",
            stage="launch",
            impl=f"{_SRT}.arg_groups.hicache_hook:resolve_hicache_dcp_compatibility",
            signature="server_args",
            why="refuses the hierarchical cache for every model but MLA",
            how="does not ask it about GQA that the series serves; the compatibility table knows",
            upstream="none",
            until="upstream has a host pool for sharded K and V",
        ),
        Hook(
            target="sglang.srt.managers.scheduler.Scheduler.attach_hicache_storage_wrapped",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.managers.scheduler:attach_hicache_storage",
            signature="self, recv_req",
            why="attaches at run time what the flag refuses at start-up",
            how="refuses by the rows of --hicache-storage-backend",
            upstream="none",
            until="the rows work",
        ),
        Hook(
            target="sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler.build_kv_host_pool",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.mem_cache.hybrid_cache.hybrid_pool_assembler:build_kv_host_pool",
            signature="kv_pool, page_size, use_mla=, override_kv_cache_dim=, host_size=, "
            "mtp_draft_device_pools=, pool_label=",
            why="the host pool of K and V would copy rows at widened slots, out of its bounds",
            how="builds one that moves the rows which this rank owns",
            upstream="none",
            until="upstream has a host pool for sharded K and V",
        ),
        Hook(
            target="sglang.srt.managers.cache_controller.HiCacheController.attach_storage_backend",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.managers.cache_controller:attach_storage_backend",
            signature="self, storage_backend, prefetch_threshold=, model_name=, "
            "storage_backend_extra_config=",
            why="storage behind a sharded host pool is for MLA alone",
            how="attaches files to the host pool that the series builds for K and V",
            upstream="none",
            until="upstream has storage for sharded K and V",
        ),
        Hook(
            target="sglang.srt.managers.cache_controller.HiCacheController"
            "._generate_storage_config",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.managers.cache_controller:generate_storage_config",
            signature="self, model_name=, storage_backend_extra_config=",
            why="see attach_storage_backend, which hides the share of a rank from upstream's check",
            how="says the share that the rank has",
            upstream="none",
            until="see attach_storage_backend",
        ),
        Hook(
            target="sglang.srt.mem_cache.hicache_storage.HiCacheStorageConfig.__post_init__",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.mem_cache.hicache_storage:check_storage_config",
            signature="self",
            why="refuses a rank's share of K and V",
            how="makes upstream's other checks",
            upstream="none",
            until="see attach_storage_backend",
        ),
        Hook(
            target="sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.beam_search.coordinator:validate_and_init",
            signature="self, req, recv_req",
            why="lets beams through at pages of one token, though a sharded pool's are K times as "
            "long: all beams would write to the same slots",
            how="refuses the request",
            upstream="none",
            until="upstream asks for the allocator's page size",
        ),
        Hook(
            target="sglang.srt.managers.schedule_policy.PrefillAdder.__init__",
            kind="before",
            stage="serve",
            impl=f"{_SRT}.managers.schedule_policy:prefill_adder_init",
            signature="self, page_size, tree_cache, token_to_kv_pool_allocator, running_batch, "
            "new_token_ratio, rem_input_tokens, rem_chunk_tokens, num_mixed_decode_tokens=, "
            "priority_scheduling_preemption_threshold=, max_prefill_bs=, max_running_requests=, "
            "prefill_max_requests=, prefill_delayer_single_pass=, dllm_config=, "
            "waiting_queue_len=, prefill_tile_block_m=",
            why="budgets in the pool's pages, not the allocator's K times longer ones",
            how="hands it the allocator's page size",
            upstream="none",
            until="the scheduler passes the allocator's page size",
        ),
        Hook(
            target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.managers.schedule_policy:add_one_req",
            signature="self, req, has_chunked_req, truncation_align_size",
            why="a prompt that reaches into the pool's last two pages is accepted and waits for "
            "ever, and everything behind it; K times as many lengths as in plain TP",
            how="asks for no page in reserve where nothing else runs",
            upstream="none",
            until="upstream admits what fits an idle pool",
        ),
        Hook(
            target="sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.managers.scheduler:init_req_max_new_tokens",
            signature="self, req",
            why="a prompt with no room for an answer gets one of no token, with finish reason "
            "length; so does one that --allow-auto-truncate is about to shorten",
            how="shortens first, and refuses with the numbers",
            upstream="none",
            until="upstream refuses such a prompt",
        ),
        *(
            Hook(
                target=f"sglang.srt.mem_cache.allocator.{allocator}.max_new_tokens_for_memory",
                kind="replace",
                stage="serve",
                impl=f"{_SRT}.mem_cache.allocator.base:max_new_tokens_for_memory",
                signature="self, input_tokens, max_new_tokens, token_capacity, "
                "sliding_window_size, chunk_size",
                why="keeps back a page and the rest of another, so that answers are empty while "
                "a page is free; K times as many lengths as in plain TP",
                how="gives the answer all slots but those that a decode step takes ahead",
                upstream="none",
                until="upstream counts slots and not pages",
            )
            for allocator in ("paged.PagedTokenToKVPoolAllocator", "swa.SWATokenToKVPoolAllocator")
        ),
        Hook(
            target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.configure",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.mem_cache.kv_cache_configurator:configure",
            signature="self, pre_model_load_memory",
            why="the scheduler would take the rows of a rank for the tokens that full layers hold "
            "beside windows",
            how="tells it slots",
            upstream="none",
            until="upstream widens the full pool of models with windows",
        ),
        Hook(
            target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
            ".logical_token_capacity",
            kind="replace",
            stage="serve",
            impl=f"{_SRT}.mem_cache.kv_cache_configurator:logical_token_capacity",
            signature="self, max_total_num_tokens",
            why="never widens a model with windows",
            how="widens it like all others",
            upstream="none",
            until="see configure",
        ),
        Hook(
            target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
            "._build_hybrid_swa_kv_pool",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.mem_cache.kv_cache_configurator:build_hybrid_swa_kv_pool",
            signature="self, full_max_total_num_tokens, swa_max_total_num_tokens, mha_pool_class",
            why="gives both pools the same pages and full layers' heads of a group, so that the "
            "windows' last page is beyond its pool",
            how="gives each its own",
            upstream="none",
            until="see configure",
        ),
        Hook(
            target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
            "._build_token_to_kv_pool_allocator",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.mem_cache.kv_cache_configurator:build_token_to_kv_pool_allocator",
            signature="self, sizes, token_to_kv_pool, is_dsv4_model, req_to_token_pool, "
            "token_to_kv_pool_allocator",
            why="see logical_token_capacity",
            how="upstream's allocator of both pools, in widened slots and pages",
            upstream="none",
            until="see configure",
        ),
        Hook(
            target="sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.model_executor.pool_configurator:create_memory_pool_configurator",
            signature="kvc",
            why="takes a rank's rows of full layers for tokens where it divides memory among them "
            "and windows",
            how="counts K tokens a row, and pages of the windows as long as the allocator's",
            upstream="none",
            until="see configure",
        ),
        Hook(
            target="sglang.srt.managers.scheduler_components.invariant_checker"
            ".SchedulerInvariantChecker._check_full_pool",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.managers.invariant_checker:check_full_pool",
            signature="self, ps, uncached=",
            why="lets every lost slot pass under DCP",
            how="counts whole widened pages, exactly, when the rank is idle",
            upstream="none",
            until="upstream's check is exact under DCP",
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
            impl=f"{_SRT}.model_executor.model_runner:prepare_exchange",
            signature="self",
            why="an exchange that one machine gets wrong shows in answers alone; symmetric memory "
            "is allocated by all ranks at once, before the pool is sized and graphs are captured",
            how="allocates it for the heads, widths and dtype of the loaded model; tries every "
            "exchange once against a reference, and stops all ranks where one gets it wrong",
            upstream="sgl-project/sglang#33364, #40539",
            until="upstream tries its exchanges",
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
    ),
)

DCP_REPLICATE_V_PROJ = Field(
    name="dcp_replicate_v_proj",
    namespace="parallel",
    after="dcp_replicate_q_proj",
    type=bool,
    flags=("--dcp-replicate-v-proj",),
    help="For MLA over a sharded cache: hold the value projections of all heads of a KVP group on "
    "each of its ranks and, in decode batches that pay for it, project values before the exchange, "
    "which then carries a quarter of the bytes. `python -m sglang_helix layout` says the memory.",
)

QPROJ = Patch(
    "qproj",
    "Projections replicated in each KVP group: queries are not gathered, for GQA (the sharding of "
    "QKVParallelLinear in a2a) and MLA, and MLA's values are projected before the exchange",
    (
        Hook(
            target="sglang.srt.model_executor.model_runner.ModelRunner.load_model",
            kind="after",
            stage="serve",
            impl=f"{_SRT}.model_executor.model_runner:load_model",
            signature="self",
            why="MLA's replicas are made after the pool is sized, so their memory is not counted; "
            "weights that cannot be replicated are skipped with a warning; values have none",
            how="gathers them once the model is loaded, in memory that is released with the "
            "weights', and refuses where they were asked for",
            upstream="sgl-project/sglang#21637",
            until="upstream accounts for the replicas and refuses",
        ),
        Hook(
            target="sglang.srt.model_executor.model_runner.ModelRunner._prepare_replicated_q_proj",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.model_executor.model_runner:prepare_replicated_q_proj",
            signature="self",
            why="would gather them a second time, at other addresses",
            how="does nothing: see load_model",
            upstream="sgl-project/sglang#21637",
            until="see load_model",
        ),
        *(
            Hook(
                target="sglang.srt.model_executor.model_runner_components.weight_updater"
                f".WeightUpdater.{method}",
                kind="around",
                stage="serve",
                impl=f"{_SRT}.model_executor.weight_updater:{impl}",
                signature=signature,
                why="a rank that fails is not noticed by the others; the replicas of MLA keep the "
                "weights of before the update: wrong tokens",
                how="ranks agree on success; a whole update that succeeded renews the replicas in "
                "place, one that failed gives up those that are stale",
                upstream="none",
                until="upstream's ranks agree, and it renews the replicas",
            )
            for method, impl, signature in (
                (
                    "update_weights_from_disk",
                    "update",
                    "self, model_path, load_format, weight_name_filter=, recapture_cuda_graph=",
                ),
                ("update_weights_from_ipc", "update", "self, recv_req"),
                (
                    "receive_weights_from_distributed",
                    "receive",
                    "self, names, dtypes, shapes, group_name, load_format=",
                ),
                ("load_weights_from_distributed", "load_bucket", "self, named_tensors"),
                ("update_weights_from_tensor", "load_bucket", "self, named_tensors, load_format="),
                ("end_weight_update", "end", "self, run_post_load"),
            )
        ),
        Hook(
            target="sglang.srt.managers.scheduler_components.weight_updater"
            ".SchedulerWeightUpdaterManager.end_weight_update",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.model_executor.weight_updater:end_session",
            signature="self, recv_req",
            why="the end of a session of updates cannot fail but by ending the server",
            how="answers with the failure that every rank agreed on",
            upstream="none",
            until="upstream's ranks agree, and it renews the replicas",
        ),
    ),
    fields=(DCP_REPLICATE_V_PROJ,),
)

ATTENTION_TP_SIZE = Field(
    name="attention_tensor_parallel_size",
    namespace="parallel",
    after="dcp_size",
    type=int,
    flags=("--attention-tensor-parallel-size", "--attn-tp-size"),
    help="Shard the heads of attention over this many ranks in place of all --tp-size ones; the "
    "ranks that hold the same heads split the sequence of the KV cache. --dcp-size becomes tp size "
    "/ attention tp size, and the query projection is replicated; with --no-dcp-replicate-q-proj "
    "queries are gathered. Default: same as --tp-size.",
    metavar="A",
)

ATTN_TP = Patch(
    "attn_tp",
    "Attention on fewer head shards than the FFN: --attn-tp-size",
    (
        Hook(
            target="sglang.srt.server_args.ServerArgs.add_cli_args",
            kind="after",
            stage="launch",
            impl="sglang_helix.flags:add_cli_args",
            signature="parser",
            why="the flag does not exist",
            how="adds it to every parser of server arguments, YAML files included",
            upstream="sgl-project/sglang#29736",
            until="upstream has the flag",
        ),
        Hook(
            target="sglang.srt.server_args.ServerArgs.from_cli_args",
            kind="after",
            stage="launch",
            impl="sglang_helix.flags:from_cli_args",
            signature="args",
            why="drops what is not a field, and a field cannot be added from outside",
            how="keeps the value beside the fields",
            upstream="sgl-project/sglang#29736",
            until="upstream has the flag",
        ),
        Hook(
            target="sglang.srt.entrypoints.engine.Engine.server_args_class",
            kind="attribute",
            stage="launch",
            impl="sglang_helix.flags:make_server_args",
            signature="",
            why="sglang.Engine(attn_tp_size=A) would be an unknown argument",
            how="takes the series' own out, builds ServerArgs, and keeps them beside the fields",
            upstream="sgl-project/sglang#29736",
            until="upstream has the flag",
        ),
        Hook(
            target="sglang.srt.entrypoints.engine.Engine.__init__",
            kind="before",
            stage="launch",
            impl="sglang_helix.flags:check_engine_arguments",
            signature="self, **kwargs",
            why="Engine(server_args=..., attn_tp_size=A) drops the latter without a word",
            how="an error that says what to do",
            upstream="none",
            until="Engine refuses arguments beside server_args",
        ),
        Hook(
            target="sglang.srt.arg_groups.parallel_hook.handle_deprecated_dp_attention",
            kind="resolution",
            stage="launch",
            impl=f"{_SRT}.server_args:resolve_attn_tp_size",
            signature="server_args",
            why="later steps read dcp_size",
            how="sets dcp_size = N / A and replicated queries before any of them",
            upstream="sgl-project/sglang#29736",
            until="upstream has the flag",
        ),
    ),
    fields=(ATTENTION_TP_SIZE,),
)

SYMM = Patch(
    "symm",
    "The exchange as one kernel over symmetric memory: --dcp-comm-backend symm",
    (
        Hook(
            target="sglang.srt.server_args.ServerArgs.add_cli_args",
            kind="after",
            stage="launch",
            impl=f"{_SRT}.server_args:add_comm_backends",
            signature="parser",
            why="the flag's choices are upstream's backends",
            how="adds one, in every parser of server arguments, YAML files included",
            upstream="sgl-project/sglang#33364, #40539",
            until="upstream has a one-kernel exchange",
        ),
    ),
    modules=tuple(
        f"{_SRT}.layers.dcp.{name}"
        for name in ("symm", "symm_launch", "symm_layout", "symm_workspace")
    ),
)

DRAFTS = Patch(
    "drafts",
    "Speculative decoding with draft models: they run plain TP over a whole cache of their own",
    (
        Hook(
            target="sglang.srt.speculative.spec_utils.draft_tp_context",
            kind="around",
            stage="serve",
            impl=f"{_SRT}.speculative.spec_utils:draft_tp_context",
            signature="layout",
            why="drafts would read the KVP group: cut heads, and a whole cache by owner",
            how="no group for what runs inside; MLA of the series' adapters as upstream's take it",
            upstream="sgl-project/sglang#31785",
            until="upstream's drafts read a topology of their own",
        ),
        Hook(
            target="sglang.srt.model_executor.model_runner.ModelRunner.forward",
            kind="before",
            stage="serve",
            impl=f"{_SRT}.speculative.spec_utils:check_scope",
            signature="self, forward_batch, skip_attn_backend_init=, pp_proxy_tensors=, "
            "reinit_attn_backend=, split_forward_count=",
            why="a draft outside the scope, or the target inside, would read wrong rows silently",
            how="stops the rank with an error",
            upstream="none",
            until="see draft_tp_context",
        ),
        Hook(
            target="sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator.__init__",
            kind="after",
            stage="serve",
            impl=f"{_SRT}.model_executor.pool_configurator:count_draft",
            signature="self, kvc",
            why="counts a draft layer as a sharded one of the target's: too little memory by K - 1 "
            "layers of MLA, and by the heads of others",
            how="counts the draft's own heads and widths, for the tokens of all ranks",
            upstream="sgl-project/sglang#31785",
            until="upstream counts replicated drafts of every kind, as it does DSA's",
        ),
        Hook(
            target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._init_pools",
            kind="after",
            stage="serve",
            impl=f"{_SRT}.mem_cache.kv_cache_configurator:mark_replicated",
            signature="self, sizes, req_to_token_pool, token_to_kv_pool_allocator",
            why="only the pool of DSA drafts says that it is whole",
            how="every pool of a draft says so; kinds that were never tried are refused",
            upstream="sgl-project/sglang#31785",
            until="upstream marks every draft's pool",
        ),
        Hook(
            target="sglang.srt.layers.attention.triton_backend.TritonMultiStepDraftBackend"
            ".__init__",
            kind="after",
            stage="serve",
            impl=f"{_SRT}.layers.attention.triton_backend:draft_pages",
            signature="self, model_runner, topk, speculative_num_steps",
            why="reads the branches of a tree by --page-size, though they lie in pages K times as "
            "long: drafts of other tokens",
            how="reads them by the allocator's page size",
            upstream="none",
            until="upstream asks the allocator",
        ),
    ),
)

DISAGGREGATION = Patch(
    "disaggregation",
    "Prefill-decode disaggregation by Mooncake of caches that are sharded otherwise on both sides",
    (
        *(
            Hook(
                target=f"sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.{name}",
                kind="around",
                stage="serve",
                impl=f"{_SRT}.mem_cache.memory_pool:{name}",
                signature=f"self, {arguments}, mamba_indices=, req_pool_index=",
                why="keeps a retracted request's rows by widened slots, beyond the pool's end",
                how="keeps the rows that this rank owns",
                upstream="none",
                until="upstream's K/V pool keeps its own share, as MLA's does",
            )
            for name, arguments in (
                ("get_cpu_copy", "indices"),
                ("load_cpu_copy", "kv_cache_cpu, indices"),
            )
        ),
        Hook(
            target=f"{_MOONCAKE}.MooncakeKVManager.register_to_bootstrap",
            kind="before",
            stage="transfer",
            impl=f"{_SRT}.disaggregation.mooncake.conn:mark_layout",
            signature="self",
            why="a decode server cannot tell whether a prefill server would end at its layout",
            how="registers K beside what SGLang registers",
            upstream="none",
            until="upstream registers K, and its servers send K and V by owner",
        ),
        Hook(
            target=f"{_MOONCAKE}.MooncakeKVManager.try_ensure_parallel_info",
            kind="around",
            stage="transfer",
            impl=f"{_SRT}.disaggregation.mooncake.conn:try_ensure_parallel_info",
            signature="self, bootstrap_addr",
            why="a decode server that shards K and V ends there",
            how="asks the prefill ranks that hold the heads, K decode ranks each of them",
            upstream="none",
            until="upstream sends K and V by owner",
        ),
        Hook(
            target=f"{_MOONCAKE}.MooncakeKVReceiver.init",
            kind="around",
            stage="transfer",
            impl=f"{_SRT}.disaggregation.mooncake.conn:init_receiver",
            signature="self, prefill_dp_rank",
            why="a prefill server without the series would end its thread at such a decode server",
            how="ends the request with the reason",
            upstream="none",
            until="see try_ensure_parallel_info",
        ),
        Hook(
            target=f"{_MOONCAKE}.MooncakeKVManager.requires_dcp_relayout",
            kind="around",
            stage="transfer",
            impl=f"{_SRT}.disaggregation.mooncake.conn:requires_dcp_relayout",
            signature="self, dst_dcp_size, dst_dcp_rank",
            why="raises in the thread that decode servers register with, which ends, and every "
            "later request waits for its timeout",
            how="leaves the refusal to the check of the peer's layout",
            upstream="none",
            until="upstream rejects the peer",
        ),
        Hook(
            target=f"{_MOONCAKE}.MooncakeKVManager.prepare_dcp_token_item_lens",
            kind="around",
            stage="transfer",
            impl=f"{_SRT}.disaggregation.mooncake.conn:prepare_dcp_token_item_lens",
            signature="self, dst_page_item_lens, dst_dcp_size",
            why="raises there too, unless both ranks have the same heads",
            how="asks for that of latents alone",
            upstream="none",
            until="see try_ensure_parallel_info",
        ),
        Hook(
            target=f"{_MOONCAKE}.MooncakeKVManager._validate_peer_state_layout",
            kind="around",
            stage="transfer",
            impl=f"{_SRT}.disaggregation.mooncake.conn:validate_peer_state_layout",
            signature="self, registration_info",
            why="see requires_dcp_relayout",
            how="rejects a peer with another layout, with both values; its requests end at once",
            upstream="none",
            until="see requires_dcp_relayout",
        ),
        Hook(
            target=f"{_MOONCAKE}.MooncakeKVManager.send_kvcache_dcp",
            kind="around",
            stage="transfer",
            impl=f"{_SRT}.disaggregation.mooncake.conn:send_kvcache_dcp",
            signature="self, mooncake_session_id, prefill_kv_indices, dst_kv_ptrs, "
            "dst_kv_indices, dcp_token_item_lens, dst_dcp_size, dst_dcp_rank, src_page_offset, "
            "decode_prefix_len, num_kv_tokens, executor, dst_layer_ids, pack_buffer=, "
            "dst_kv_item_lens=, dst_tp_rank=, dst_attn_tp_size=",
            why="knows whole rows only, which latents are",
            how="sends the heads that both ranks hold of the tokens that the decode rank owns",
            upstream="none",
            until="see try_ensure_parallel_info",
        ),
    ),
)

METRICS = Patch(
    "metrics",
    "What an operator sees of a sharded cache beside SGLang's metrics: --enable-metrics",
    tuple(
        Hook(
            target=f"sglang.srt.managers.scheduler.Scheduler.{name}",
            kind="after",
            stage="serve",
            impl=f"{_SRT}.observability.metrics_collector:{implementation}",
            signature=signature,
            why="SGLang's metrics know neither the rows of a rank nor its exchange",
            how=how,
            upstream="none",
            until="upstream exports them",
        )
        for name, signature, implementation, how in (
            ("emit_metrics_constants", "self", "start_metrics", "makes this rank's metrics"),
            (
                "process_batch_result",
                "self, batch, result",
                "count_batch",
                "counts the batch by its exchange, and reads the pool",
            ),
            ("on_idle", "self", "refresh_idle", "reads the pool once more"),
        )
    ),
)

SERIES: tuple[Patch, ...] = (A2A, QPROJ, ATTN_TP, SYMM, DRAFTS, DISAGGREGATION, METRICS)


def hooks(stage: Stage | None = None) -> Iterator[Hook]:
    """Every hook of the series in order, or those of one stage."""
    for patch in SERIES:
        for hook in patch.hooks:
            if stage is None or hook.stage == stage:
                yield hook
