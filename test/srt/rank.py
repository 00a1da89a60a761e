"""Become a rank of a server, in this process: what `Scheduler.__init__` does until it loads."""

from typing import Any


def published(rank: int, argv: list[str]) -> Any:
    """Load plugins, resolve a server's arguments and make them the process's own; the arguments."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(argv)
    server_args.resolve_once()
    server_args.check_server_args()
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    return server_args


def become_rank(rank: int, argv: list[str]) -> Any:
    """And join the process groups, on the CPU, at the arguments' `--nccl-port`; the arguments."""
    server_args = published(rank, argv)
    from sglang_helix.build import join_groups

    join_groups(server_args, server_args.nccl_port)
    return server_args
