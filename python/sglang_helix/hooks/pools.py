"""Hooks: the pool's rows, their writers, and how many there are."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

POOLS: tuple[Hook, ...] = (
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
)
