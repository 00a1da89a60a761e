"""Hooks: the hierarchical cache of K and V, and files behind it."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

HICACHE: tuple[Hook, ...] = (
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
        target="sglang.srt.managers.cache_controller.HiCacheController._generate_storage_config",
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
)
