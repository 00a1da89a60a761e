"""``python -m benchmark.dcp COMMAND``; each command is a module here with ``main(argv) -> int``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

COMMANDS = {
    "kernels": "combine, pack and the one-kernel exchange beside their peers, on one device",
    "attention": "decode over a shard of the cache, by each adapter beside plain TP's kernels",
    "collectives": "the exchange through real process groups",
    "serve": "whole servers: tensor parallelism beside the layouts of the series",
    "fit": "the cost model of `layout`, fitted to the figures of `serve`",
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.dcp")
    commands = parser.add_subparsers(dest="command", required=True)
    here = {name for name in COMMANDS if importlib.util.find_spec(f"benchmark.dcp.{name}")}
    for name, help_text in COMMANDS.items():
        if name not in here:  # in SGLang's own tree not all of them are
            continue
        # Options, --help among them, belong to the module, loaded only when it is chosen.
        commands.add_parser(name, help=help_text, add_help=False)
    command = parser.parse_args(argv[:1]).command
    return importlib.import_module(f"benchmark.dcp.{command}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
