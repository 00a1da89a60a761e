"""Command line: ``series``, ``export``, ``compatibility``, ``check`` and ``layout``."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_helix.build import Builder
from sglang_helix.check import (
    CPU,
    LAYOUT_FLAGS,
    MACHINES,
    check,
    check_layouts,
    configuration_of,
    machine_here,
)

if TYPE_CHECKING:
    from sglang_helix.contract import Contract
    from sglang_helix.layout import Shape

_GPU_HELP = (
    "h100, h200, b200, gb200, or TB/s of memory, GB/s to peers, dense bf16 TFLOP/s and GiB: "
    "4.8,450,989,141"
)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m sglang_helix", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    series = commands.add_parser(
        "series", help="check every hook, and all else that is borrowed, against SGLang"
    )
    series.add_argument(
        "--why",
        action="store_true",
        help="print the catalogue entry of each hook, and what nobody has looked at",
    )
    series.add_argument(
        "--sglang",
        type=Path,
        metavar="DIR",
        help="the package `sglang` of another version, unpacked: read, not imported",
    )
    series.add_argument(
        "--record",
        action="store_true",
        help="the bodies that differ have been read: write down what they are now",
    )
    exported = commands.add_parser(
        "export", help="make the series' commits on a git checkout of SGLang, as a new branch"
    )
    exported.add_argument("checkout", type=Path, help="a clean git checkout")
    exported.add_argument("--branch", default="helix", help="the branch to make (default: helix)")
    exported.add_argument(
        "--format-patch", type=Path, metavar="DIR", help="write files for git am as well"
    )
    commands.add_parser("compatibility", help="who serves what beside a sharded cache (Markdown)")
    asked = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="who serves models, in which layouts; other arguments are a server's; ends with 1 if "
        "one is refused",
    )
    asked.add_argument(
        "--model-path", "--model", nargs="+", required=True, help="directories with a config.json"
    )
    asked.add_argument(
        *("--tp", "--tp-size", "--tensor-parallel-size"),
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="ranks; without a layout's flags also several numbers: one that works is enough",
    )
    asked.add_argument(
        "--on",
        type=str.capitalize,
        choices=[*MACHINES, CPU],
        help="a machine's GPUs, or none; default: this one's, or Hopper where it has none",
    )
    layout = commands.add_parser("layout", help="list every legal layout of a model")
    layout.add_argument(
        "--model-path", required=True, help="directory with the model's config.json"
    )
    layout.add_argument("--tp", "--tp-size", type=int, required=True, help="N, the number of ranks")
    layout.add_argument(
        "--kv-memory-gib",
        type=float,
        help="memory of each rank for the cache; default: 40, with --gpu what the weights leave",
    )
    layout.add_argument("--kv-cache-dtype", choices=("bf16", "fp8", "fp32"), default="bf16")
    cost = layout.add_argument_group("time per token of every layout, computed")
    cost.add_argument("--gpu", metavar="NAME|TB/S,GB/S,TFLOPS,GIB", help=_GPU_HELP)
    cost.add_argument("--contexts", type=int, nargs="+", default=[8192, 131072, 1048576])
    cost.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], metavar="REQUESTS")
    cost.add_argument(
        "--weight-dtype", choices=("bf16", "fp8", "fp4"), help="default: as config.json has it"
    )
    cost.add_argument(
        "--dcp-replicate-v-proj", action="store_true", help="all of them with this flag, of MLA"
    )
    cost.add_argument("--plot", type=Path, metavar="PNG", help="write a PNG; needs matplotlib")
    layout.add_argument(
        "--draft-model-path", help="a draft model's directory; of MTP layers, the model's own"
    )
    options, server = parser.parse_known_args(argv)
    if server and options.command != "check":
        parser.error(f"unrecognized arguments: {' '.join(server)}")
    with _without_sglangs_log():
        return _run(options, server)


@contextmanager
def _without_sglangs_log() -> Iterator[None]:
    """What SGLang's modules cannot do on this machine is no part of an answer."""
    log = logging.getLogger("sglang")
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"sglang\.")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def _run(options: argparse.Namespace, server: list[str]) -> int:
    if options.command == "check":
        return print_verdict(options.model_path, options.tp, server, options.on)
    if options.command == "series":
        return print_series(options.why, options.sglang, record=options.record)
    if options.command == "export":
        return print_export(options.checkout, options.branch, options.format_patch)
    if options.command == "layout":
        return print_layouts(options)
    return print_compatibility()


def print_series(catalogue: bool, sglang: Path | None = None, *, record: bool = False) -> int:
    """Print the hooks and what else the series takes for granted; 1 where SGLang differs."""
    from sglang_helix.contract import Contract, installed
    from sglang_helix.hook import SeriesError, check_version, installed_sglang
    from sglang_helix.series import SERIES

    failures = 0
    contract = Contract(sglang) if sglang else installed()
    try:
        print(f"sglang in {sglang}" if sglang else f"sglang {installed_sglang()}")
        if sglang is None:
            check_version()
    except SeriesError as unsupported:
        print(unsupported)
        failures += 1
    for patch in SERIES:
        print(f"\n{patch.name}: {patch.summary}")
        for hook in patch.hooks:
            problem = contract.hook_problem(hook) if sglang else hook.check()
            failures += bool(problem)
            state = f"DIFFERS: {problem}" if problem else "ok"
            print(f"  {hook.stage:8}  {hook.kind:10}  {hook.target}  {state}")
            if catalogue:
                for name in ("why", "how", "upstream", "until"):
                    text = f"{name}: {getattr(hook, name)}"
                    print(textwrap.indent(textwrap.fill(text, 84), " " * 10))
    return 1 if failures + print_borrowed(contract, catalogue, record=record) else 0


def print_borrowed(contract: Contract, catalogue: bool, *, record: bool) -> int:
    """Print what the series takes for granted beside its hooks; how much of it differs."""
    from sglang_helix.contract import changed, reference
    from sglang_helix.contract import record as write

    platform = reference(contract)
    uses, bodies = contract.uses(), contract.bodies()
    if record:
        write(contract)
    symbols = {use.symbol for use in uses}
    private = [name for name in symbols if re.search(r"\._[a-zA-Z]", name)]
    misfits = [
        f"{use.symbol} {use.problem} ({use.where})"
        for use in uses + (platform.uses() if platform else [])
        if use.problem
    ]
    differing = changed(contract)
    arguments, variables = contract.unlisted()
    print(f"\nborrowed: {len(symbols)} symbols, {len(private)} of them private, {len(uses)} uses")
    print(f"read: {len(bodies)} bodies that the series hooks, overrides or rests on")
    print(
        f"asked: {len(contract.arguments())} arguments, {len(contract.variables())} environment "
        f"variables of the modules that it touches; {len(contract.not_seen())} of them nobody has "
        "looked at" + (f": {', '.join(contract.not_seen())}" if catalogue else "")
    )
    for line in misfits + differing:
        print(f"  DIFFERS: {line}")
    for line in (*arguments, *variables):
        print(f"  NEW: {line}")
    return len(misfits) + len(differing) + len(arguments) + len(variables)


def print_export(checkout: Path, branch: str, patches: Path | None) -> int:
    """Export the series to a checkout; 1 where it refuses, with the reason."""
    from sglang_helix.export import export
    from sglang_helix.hook import SeriesError

    try:
        commits = export(checkout, branch, patches)
    except SeriesError as refused:
        print(refused, file=sys.stderr)
        return 1
    print(f"{len(commits)} commits on the new branch {branch}: git -C {checkout} switch {branch}")
    if patches is not None:
        print(f"{len(commits)} files for git am in {patches}")
    return 0


def print_verdict(
    paths: list[str], tp_sizes: list[int], server: list[str], machine: str | None
) -> int:
    """Print a line a model: its verdict, and why; how many are served; 1 where one is refused.

    Without a layout among the flags, every one that the model's heads allow on so many ranks.
    """
    if machine is None and (machine := machine_here()):
        named = ", ".join([*MACHINES, CPU])
        print(f"this machine has no GPU: as on {machine} (--on: {named})", file=sys.stderr)
    asked = LAYOUT_FLAGS & {flag.partition("=")[0] for flag in server}
    refused, one_server = 0, bool(asked) or tp_sizes == [1]
    if one_server and len(tp_sizes) > 1:
        numbers = " ".join(map(str, tp_sizes))
        print(f"refused: --tp {numbers}: give one number beside {', '.join(sorted(asked))}")
        return 1
    with Builder() as builder:
        for path in paths:
            if one_server:
                argv = ["--model-path", path, "--tp-size", str(tp_sizes[0]), *server]
                answer = check(argv, builder, machine)
            else:
                answer = check_layouts(path, tp_sizes, server, builder, machine)
            name = f"{path}: " if len(paths) > 1 else ""
            print(f"{name}{answer.verdict}: {answer.meaning}", flush=True)
            refused += answer.verdict == "refused"
    if len(paths) > 1:
        print(f"{len(paths) - refused} of {len(paths)} served")
    return int(refused > 0)


def print_layouts(options: argparse.Namespace) -> int:
    """Print every legal layout of a model, and its time on a GPU that is given; 1: it cannot."""
    from sglang_helix.layout import (
        beside_a_draft,
        draft_shape_of,
        shape_of,
        state_bytes,
        states,
        table,
        values_first,
        window_layers,
    )

    draft = options.draft_model_path
    try:
        model_config = configuration_of(options.model_path)
        drafted = draft_shape_of(draft) if draft else None
    except (OSError, ValueError) as problem:
        print(f"--model-path {options.model_path}: {problem}", file=sys.stderr)
        return 1
    memory = 40 if options.kv_memory_gib is None else options.kv_memory_gib
    shape = shape_of(model_config)
    print(table(shape, options.tp, memory, options.kv_cache_dtype, drafted))
    if values := values_first(model_config, options.tp):
        print("\n" + values)
    if drafted:
        print("\n" + beside_a_draft(shape, drafted, options.tp, options.kv_cache_dtype))
    if (state := state_bytes(model_config, options.tp)) is not None:
        print("\n" + states(shape, options.tp, state, options.kv_cache_dtype))
    if windows := window_layers(model_config):
        print(f"\nWithout {windows} window layers, whose pool of their own every rank holds whole.")
    return print_advice(options, model_config, drafted) if options.gpu else 0


def print_advice(options: argparse.Namespace, model_config: Any, draft: Shape | None) -> int:
    """Print, and plot where asked, milliseconds per token of every layout; 1: it cannot."""
    from sglang_helix import advice, cost
    from sglang_helix.layout import CACHE_BYTES

    try:
        compared = cost.advise(
            cost.model_of(model_config),
            options.tp,
            cost.gpu_of(options.gpu),
            kv_memory_gib=options.kv_memory_gib,
            cache_bytes=CACHE_BYTES[options.kv_cache_dtype],
            weight_element=cost.weight_element_of(model_config, options.weight_dtype),
            values_first=options.dcp_replicate_v_proj,
            draft=draft,
        )
        if draft:
            print("\nBelow, tokens are those beside the draft's cache; times are without drafts.")
        print("\n" + advice.table(compared, options.contexts, options.concurrency))
        if options.plot:
            advice.plot(compared, options.contexts, options.concurrency, options.plot)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    except ImportError as problem:
        print(f"--plot {options.plot}: {problem}; pip install matplotlib", file=sys.stderr)
        return 1
    return 0


def print_compatibility() -> int:
    """Print the compatibility table as Markdown, group by group."""
    from sglang_helix.srt.compatibility.row import Row
    from sglang_helix.srt.compatibility.rows.beside_own import BESIDE_OWN
    from sglang_helix.srt.compatibility.table import GROUPS

    def rows(heading: str, table: tuple[Row, ...]) -> None:
        print(
            f"\n## {heading}\n\n| feature | flag | verdict | why | instead | SGLang 0.5.23 alone |"
        )
        print("|---|---|---|---|---|---|")
        for row in table:
            flag = f"`{row.flag}`" if row.flag else ""
            alone = f"{row.by_sglang}: {row.proof}" if row.proof else row.by_sglang
            print(
                f"| {row.feature} | {flag} | {row.status} | {row.why} | {row.instead} | {alone} |"
            )

    for heading, table in GROUPS.items():
        rows(heading, table)
    rows("Refused besides, where the verdict is own", BESIDE_OWN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
