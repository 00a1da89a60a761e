"""The kernels of the exchange beside their peers, on one device.

    python -m benchmark.dcp kernels                              the full run, on a GPU
    python -m benchmark.dcp kernels --device cpu --batch 1 2     a small one, anywhere

Six operations, for N ranks that share H heads (each ends with h = H/N of them), batch B:

    combine   packed rows of N partial outputs of h heads, each with its LSE -> their combination
    merge     the same from separate tensors of outputs and LSEs
    pack      one partial output of H heads and its LSE -> the send layout
    layer     all that one rank launches between attention and o_proj. A collective is stood in for
              by a copy of what it leaves on the rank, a lower bound on its time
    exchange  the same for all N ranks at once, which one device plays: the one-kernel exchange
              beside the chains of launches over the same bytes. No link is crossed here
    values    MLA's value projection and the exchange of one rank, in both orders: a2a as in
              `layer`, the one kernel as in `exchange`, which has all N ranks' work in it

and one that is run only by its name:

    variants  the one-kernel exchange as it is, and with each experiment of `VARIANTS`

Every candidate gets the same numbers in the layout it wants, and its poisoned output is checked
against float64 before it is timed. `copy` is a device-to-device copy that moves as many bytes as
the operation must. Peers are SGLang's and FlashInfer's own functions, where they can be imported.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial

import torch

from benchmark.dcp import measure, report
from benchmark.dcp.kernels_candidates import ASKED_FOR, OPERATIONS, fits, moved_bytes
from benchmark.dcp.kernels_stage import SHAPES, Peers, Problem, find_peers

BOUND = 4e-3  # relative error of bf16 results

LaunchCounts = dict[tuple[str, str, str], int | None]


def measure_problem(
    op: str, p: Problem, peers: Peers, samples: int, launch_counts: LaunchCounts
) -> list[report.Row]:
    moved = moved_bytes(op, p)
    sets = measure.sets_to_rotate(p.device, moved)
    rotations: dict[str, measure.Rotation] = {}
    errors: dict[str, float | None] = {}
    for name, case in OPERATIONS[op](p, peers):
        rotated = [
            x.expand(sets, *x.shape).clone(memory_format=torch.contiguous_format)
            for x in case.inputs
        ]
        calls = [partial(case.run, *inputs) for inputs in zip(*rotated, strict=True)]
        rotations[name] = measure.Rotation(calls, p.device)
        outputs = [case.read(out) for out in rotations[name].checked_outputs()]
        error = max(relative_error(out, case.want) for out in outputs)
        if not error <= BOUND:
            raise AssertionError(f"{op} by {name} at {p}: relative error {error}")
        errors[name] = error
        if (op, p.shape, name) not in launch_counts:
            launch_counts[op, p.shape, name] = measure.launches(calls[0])
    if not rotations:
        return []
    source = torch.randint(256, (sets, 2, moved // 2), dtype=torch.uint8, device=p.device)
    rotations[report.COPY] = measure.Rotation(
        [partial(target.copy_, whence) for whence, target in source], p.device
    )
    errors[report.COPY] = None
    timings = measure.take_turns(rotations, samples)
    return [
        report.Row(
            op=op,
            shape=p.shape,
            heads=p.heads,
            head_dim=p.head_dim,
            ranks=p.ranks,
            batch=p.batch,
            name=name,
            launches=launch_counts.get((op, p.shape, name)),
            p10_us=timing.p10,
            median_us=timing.median,
            p90_us=timing.p90,
            moved_bytes=moved,
            copy_share=timings[report.COPY].median / timing.median,
            error=errors[name],
            rotated_mib=sets * moved / 2**20,
            device=device_name(p.device),
            software=software(),
        )
        for name, timing in timings.items()
    ]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where it is NaN, which max() would lose."""
    error = float((got.double() - want).norm() / want.norm())
    return math.inf if math.isnan(error) else error


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def software() -> str:
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    return f"torch {torch.__version__}, triton {triton_version}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.dcp kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--op",
        nargs="+",
        choices=OPERATIONS,
        default=[op for op in OPERATIONS if op not in ASKED_FOR],
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16], metavar="N")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256, 4096], metavar="B")
    parser.add_argument("--samples", type=int, default=20, help="per candidate and turn, 2 turns")
    report.add_files(parser)
    parser.add_argument("--plot-ranks", type=int, default=8, metavar="N", help="the plot's N")
    options = parser.parse_args(argv)
    if options.samples < 2:
        parser.error(f"--samples {options.samples}: at least 2 are needed for percentiles")
    for shape in options.shape:
        for N in options.ranks:
            if N < 1 or SHAPES[shape][0] % N:
                parser.error(f"--ranks {N} does not divide the {SHAPES[shape][0]} heads of {shape}")
    if options.device == "cuda" and not options.from_csv and not torch.cuda.is_available():
        parser.error("no CUDA device: use --device cpu, with a small --batch")

    if options.from_csv:
        rows = [row for path in options.from_csv for row in report.read_csv(path)]
        if options.csv:
            report.write_csv(rows, options.csv)
    else:
        rows = run(options)
    print(report.table(rows))
    print(report.summary(rows))
    if options.csv:
        print(f"figures: {options.csv}")
    if options.plot:
        print(report.plot(rows, options.plot, options.plot_ranks))
    return 0


def run(options: argparse.Namespace) -> list[report.Row]:
    """All figures; those of a problem are in the CSV before the next one begins."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    print(f"{device_name(device)}, {software()}")
    peers = find_peers(device)
    rows: list[report.Row] = []
    launch_counts: LaunchCounts = {}
    if options.csv:
        report.write_csv([], options.csv)
    for op in options.op:
        for shape in options.shape:
            for ranks in options.ranks:
                for batch in options.batch:
                    started = time.monotonic()
                    problem = Problem(shape, *SHAPES[shape], ranks, batch, device)
                    name = f"{op} {shape} N={ranks} B={batch}"
                    if not fits(op, problem):
                        print(f"not measured: {name} does not fit in the memory of the device")
                        continue
                    found = measure_problem(op, problem, peers, options.samples, launch_counts)
                    if options.csv:
                        report.write_csv(found, options.csv, append=True)
                    rows += found
                    spent = time.monotonic() - started
                    print(f"{name}: {spent:.1f} s", file=sys.stderr)
    return rows
