"""Hooks: what is asked for, and whether all ranks run the same."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

LAUNCH: tuple[Hook, ...] = (
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
        target="sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info",
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
)
