"""Process groups of the layout. Extends `distributed/parallel_state.py`.

`_KVP` is upstream's decode-context-parallel group, under the name of what it does: consecutive
ranks that hold the same heads and split the sequence. `_ATTN_TP` crosses it: ranks with the same
place in their KVP groups, which together hold all heads. The data path needs no collective over
`_ATTN_TP`; checks do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_helix.srt.distributed.topology import Layout

# Groups of this process (GroupCoordinator), None while there are none.
_KVP: Any = None
_ATTN_TP: Any = None


def initialize_model_parallel(
    original: Callable[..., None],
    backend: str | None = None,
    duplicate_tp_group: bool = False,
    enable_symm_mem: bool = False,
    recovered_rank: bool = False,
    rank_offset: int = 0,
    max_world_size: int | None = None,
) -> None:
    """Build upstream's groups, its DCP group also where it refuses the platform, and `_ATTN_TP`.

    Upstream builds `_DCP` on the platforms it names and raises on others, before any group
    exists. There the rest is built first, as without DCP, then `_DCP` in the same way. Creating a
    group is collective over the world, so every rank takes the same path.
    """
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_parallel

    global _KVP, _ATTN_TP
    parallel = get_parallel()
    options = {
        "recovered_rank": recovered_rank,
        "rank_offset": rank_offset,
        "max_world_size": max_world_size,
    }
    call = (backend, duplicate_tp_group, enable_symm_mem)
    layout = Layout(parallel.tp_size, parallel.attn_dcp_size)
    if _upstream_builds_dcp(parallel_state):
        original(*call, **options)
    else:
        with parallel.override(attn_dcp_size=1):
            original(*call, **options)
    world = parallel_state.get_world_group()
    backend = backend or torch.distributed.get_backend(world.device_group)
    if parallel_state._DCP is None:
        parallel_state._DCP = parallel_state.init_model_parallel_group(
            layout.kvp_groups(world.world_size),
            world.local_rank,
            backend,
            group_name="dcp",
            **options,
        )
        parallel.override_permanently(dcp_group=parallel_state._DCP)
    _KVP = parallel_state._DCP
    _ATTN_TP = parallel_state.init_model_parallel_group(
        layout.attn_tp_groups(world.world_size),
        world.local_rank,
        backend,
        use_pynccl=False,
        use_custom_allreduce=False,
        group_name="kvp_attn_tp",
        **options,
    )
    _prewarm(_KVP)


def destroy_model_parallel(result: None) -> None:
    """After upstream has destroyed its groups, `_KVP` with them: destroy `_ATTN_TP`."""
    global _KVP, _ATTN_TP
    if _ATTN_TP is not None:
        _ATTN_TP.destroy()
    _KVP = _ATTN_TP = None


def get_kvp_group() -> Any:
    """The GroupCoordinator of the ranks that hold the same heads as this one."""
    assert _KVP is not None, "the KVP group is not initialized"
    return _KVP


def get_kvp_size() -> int:
    """K, the number of ranks that split the sequence; 1 without a sharded cache."""
    return 1 if _KVP is None else _KVP.world_size


def get_kvp_rank() -> int:
    """This rank's place in its KVP group: it stores the tokens t with t % K == place."""
    return 0 if _KVP is None else _KVP.rank_in_group


def get_attn_tp_group() -> Any:
    """The GroupCoordinator of the ranks with this rank's place in their KVP groups."""
    assert _ATTN_TP is not None, "the attention TP group is not initialized"
    return _ATTN_TP


def get_attn_tp_size() -> int:
    """A, the number of head shards of attention; raises where the cache is not sharded."""
    return get_attn_tp_group().world_size


def get_attn_tp_rank() -> int:
    """Which head shard this rank works on."""
    return get_attn_tp_group().rank_in_group


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
