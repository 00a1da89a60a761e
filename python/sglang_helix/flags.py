"""The series' fields of ServerArgs, which a plugin can only keep beside the real ones.

In SGLang's own tree they are fields (`export/`), and nothing of this is needed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from sglang_helix.hook import Field


def _fields() -> list[Field]:
    from sglang_helix.series import SERIES

    return [field for patch in SERIES for field in patch.fields]


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """After `ServerArgs.add_cli_args`: their flags, for every command line and YAML file."""
    for field in _fields():
        kind: dict[str, Any] = {"type": field.type, "metavar": field.metavar}
        if field.type is bool:
            kind = {"action": "store_true"}
        parser.add_argument(
            *field.flags, dest=_dest(field), default=field.default, help=field.help, **kind
        )


def from_cli_args(result: Any, cls: type, args: argparse.Namespace) -> None:
    """After `ServerArgs.from_cli_args`: keep the flags on the new record."""
    keep(result, **{f.argument: getattr(args, _dest(f), f.default) for f in _fields()})


def make_server_args(**fields: Any) -> Any:
    """`Engine`'s way to its ServerArgs: `sglang.Engine(attn_tp_size=A)`."""
    from sglang.srt.server_args import ServerArgs

    own = {field.argument: fields.pop(field.argument, field.default) for field in _fields()}
    server_args = ServerArgs(**fields)
    keep(server_args, **own)
    return server_args


def keep(server_args: Any, **own: Any) -> None:
    """Keep values beside the fields of a ServerArgs; `helix` has the names that they go by."""
    for argument, value in own.items():
        setattr(server_args, f"_helix_{argument}", value)


def check_engine_arguments(engine: Any, **kwargs: Any) -> None:
    """Before `Engine.__init__`, which drops every other argument where `server_args` is given."""
    for field in _fields():
        name, value = field.argument, kwargs.get(field.argument)
        if "server_args" in kwargs and value not in (None, False):
            raise ValueError(
                f"Engine(server_args=..., {name}={value}): {name} would be ignored. Give the "
                f"fields in place of server_args: Engine(model_path=..., tp_size=..., {name}=...)."
            )


def check_calling_engine() -> None:
    """The same of an `Engine.__init__` that is loading plugins now, too late for its own hook."""
    from sglang.srt.entrypoints.engine import Engine

    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_code is Engine.__init__.__code__:
            check_engine_arguments(frame.f_locals["self"], **frame.f_locals["kwargs"])


def _dest(field: Field) -> str:
    return f"helix_{field.argument}"
