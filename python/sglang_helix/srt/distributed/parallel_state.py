"""Process groups of the layout. Extends `distributed/parallel_state.py`.

A KVP group, consecutive ranks that hold the same heads and split the sequence, is upstream's
decode-context-parallel group: `get_parallel().dcp_group`. The ranks that together hold all heads
exchange nothing, so they need no group.
"""

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
    """Build upstream's groups, its DCP group also where it refuses the platform.

    Upstream builds `_DCP` on the platforms it names and raises on others, before any group
    exists. There the rest is built first, as without DCP, then `_DCP` in the same way. Creating a
    group is collective over the world, so every rank takes the same path.
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
    if _upstream_builds_dcp(parallel_state):
        original(*call, **options)
    else:
        with parallel.override(attn_dcp_size=1):
            original(*call, **options)
    if parallel_state._DCP is None:
        layout = Layout(parallel.attn_tp_size, parallel.attn_dcp_size)
        world = parallel_state.get_world_group()
        parallel_state._DCP = parallel_state.init_model_parallel_group(
            layout.kvp_groups(world.world_size),
            world.local_rank,
            backend or torch.distributed.get_backend(world.device_group),
            group_name="dcp",
            **options,
        )
        parallel.override_permanently(dcp_group=parallel_state._DCP)
    _prewarm(parallel_state._DCP)


def _prewarm(group: Any) -> None:
    """Let NCCL allocate its point-to-point transports now, before memory is accounted for.

    The first all-to-all of a captured graph would otherwise allocate them during capture. Ran
    with ranks that share a GPU, not yet between GPUs.
    """
    comm = group.pynccl_comm
    if comm is None or not comm.available:
        return
    send = torch.zeros(group.world_size << 20, dtype=torch.uint8, device=group.device)
    with comm.change_state(enable=True):
        comm.all_to_all_single(torch.empty_like(send), send)
    torch.cuda.synchronize(group.device)


def _upstream_builds_dcp(parallel_state: Any) -> bool:
    return bool(
        parallel_state.is_cuda()
        or parallel_state.is_hip()
        or parallel_state._is_npu
        or parallel_state._is_xpu
    )
