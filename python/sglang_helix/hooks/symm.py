"""Hooks: the exchange as one kernel."""

from __future__ import annotations

from sglang_helix.hook import Hook

_SRT = "sglang_helix.srt"

SYMM: tuple[Hook, ...] = (
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
)
