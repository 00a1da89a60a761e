"""Hooks: --attn-tp-size."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

ATTN_TP: tuple[Hook, ...] = (
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
)
