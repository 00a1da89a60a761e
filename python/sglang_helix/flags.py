"""The series' fields of ServerArgs, which a plugin can only keep beside the real ones.

In SGLang's own tree they are fields (`export/`), and nothing of this is needed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sglang_helix.helix import ATTN_TP_SIZE

_DEST = "helix_attn_tp_size"


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """After `ServerArgs.add_cli_args`: `--attn-tp-size`, for every command line and YAML file."""
    from sglang_helix.series import ATTENTION_TP_SIZE

    field = ATTENTION_TP_SIZE
    parser.add_argument(
        *field.flags, type=field.type, default=None, dest=_DEST, metavar="A", help=field.help
    )


def from_cli_args(result: Any, cls: type, args: argparse.Namespace) -> None:
    """After `ServerArgs.from_cli_args`: keep the flag on the new record."""
    keep_attn_tp_size(result, getattr(args, _DEST, None))


def make_server_args(attn_tp_size: int | None = None, **fields: Any) -> Any:
    """`Engine`'s way to its ServerArgs: `sglang.Engine(attn_tp_size=A)`."""
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(**fields)
    keep_attn_tp_size(server_args, attn_tp_size)
    return server_args


def keep_attn_tp_size(server_args: Any, attn_tp_size: int | None) -> None:
    """Keep A beside the fields of a ServerArgs."""
    setattr(server_args, ATTN_TP_SIZE, attn_tp_size)


def check_engine_arguments(engine: Any, **kwargs: Any) -> None:
    """Before `Engine.__init__`, which drops every other argument where `server_args` is given."""
    if "server_args" in kwargs and kwargs.get("attn_tp_size") is not None:
        raise ValueError(
            f"Engine(server_args=..., attn_tp_size={kwargs['attn_tp_size']}): attn_tp_size would "
            "be ignored. Give the fields in place of server_args: Engine(model_path=..., "
            "tp_size=..., attn_tp_size=...)."
        )


def check_calling_engine() -> None:
    """The same of an `Engine.__init__` that is loading plugins now, too late for its own hook."""
    from sglang.srt.entrypoints.engine import Engine

    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code is Engine.__init__.__code__:
            check_engine_arguments(frame.f_locals["self"], **frame.f_locals["kwargs"])
