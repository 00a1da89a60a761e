"""The KVP group on every platform. Extends `distributed/parallel_state.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_helix.srt.distributed.topology import Layout


def initialize_model_parallel(
    original: Callable[..., None],
    backend: str | None = None,
    duplicate_tp_group: bool = False,
    enable_symm_mem: bool = False,
    recovered_rank: bool = False,
    rank_offset: int = 0,
    max_world_size: int | None = None,
) -> None:
    """Build upstream's groups, and its DCP group also where upstream refuses the platform.

    Upstream builds `_DCP` on the platforms it names and raises on others, before any group
    exists. There the rest is built first, as without DCP, then `_DCP` in the same way.
    """
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    options = {
        "recovered_rank": recovered_rank,
        "rank_offset": rank_offset,
        "max_world_size": max_world_size,
    }
    call = (backend, duplicate_tp_group, enable_symm_mem)
    if parallel.attn_dcp_size == 1 or _upstream_builds_dcp(parallel_state):
        original(*call, **options)
        return
    layout = Layout(parallel.tp_size, parallel.attn_dcp_size)
    with parallel.override(attn_dcp_size=1):
        original(*call, **options)
    world = parallel_state.get_world_group()
    group = parallel_state.init_model_parallel_group(
        layout.kvp_groups(world.world_size),
        world.local_rank,
        backend or torch.distributed.get_backend(world.device_group),
        group_name="dcp",
        **options,
    )
    parallel_state._DCP = group
    parallel.override_permanently(dcp_group=group)


def _upstream_builds_dcp(parallel_state: Any) -> bool:
    return bool(
        parallel_state.is_cuda()
        or parallel_state.is_hip()
        or parallel_state._is_npu
        or parallel_state._is_xpu
    )
