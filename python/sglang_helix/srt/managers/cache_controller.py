"""Storage behind host pools of sharded K and V. Extends `managers/cache_controller.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_parallel

from sglang_helix.srt.mem_cache.pool_host.mha import ShardedMHATokenToKVPoolHost


def attach_storage_backend(
    original: Callable[..., None],
    controller: Any,
    storage_backend: str,
    prefetch_threshold: int = 256,
    model_name: str | None = None,
    storage_backend_extra_config: dict[str, Any] | None = None,
) -> None:
    """Attach files to a host pool of K and V, which upstream refuses beside `--dcp-size`.

    Its check is passed by as if nothing were sharded; `generate_storage_config` says what is.
    Raises NotImplementedError for other storage.
    """
    options = (storage_backend, prefetch_threshold, model_name, storage_backend_extra_config)
    if not isinstance(controller.storage_host_pool, ShardedMHATokenToKVPoolHost):
        original(controller, *options)
        return
    if storage_backend != "file" or controller.host_memory_mode == "buffer_only":
        raise NotImplementedError("K and V by owner are stored in files alone, behind host copies")
    with get_parallel().override(attn_dcp_size=1):
        original(controller, *options)


def generate_storage_config(
    original: Callable[..., Any],
    controller: Any,
    model_name: str | None = None,
    storage_backend_extra_config: dict[str, Any] | None = None,
) -> Any:
    """What a rank keeps in storage, with the share that it really has."""
    pool = controller.storage_host_pool
    if not isinstance(pool, ShardedMHATokenToKVPoolHost):
        return original(controller, model_name, storage_backend_extra_config)
    with get_parallel().override(attn_dcp_size=pool.shard.size):
        return original(controller, model_name, storage_backend_extra_config)
