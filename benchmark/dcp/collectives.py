"""The exchange between ranks: ours beside SGLang's, through SGLang's own process groups.

    python -m benchmark.dcp collectives                              all GPUs of this machine
    python -m benchmark.dcp collectives --device cpu --batch 1 2     gloo, anywhere

Each rank is a process with SGLang's distributed environment. N ranks hold partial outputs
[B, H, D] of the same H heads, each with its LSE [B, H]; a candidate leaves every rank the
combination of its own H/N heads. `helix` candidates are what --dcp-comm-backend selects; `sglang`
ones are upstream's functions of the same purpose on a group of upstream's own. On GPUs, processes
of their own measure what needs NCCL's symmetric memory, since torch has one such backend in a
process: FlashInfer's fused exchange (`flashinfer kernel` on inputs that lie as it wants them,
`flashinfer` from where attention leaves them), and torch's `all_to_all_nd` between our pack and our
combine.

With `--op gather` it is queries that are exchanged, before attention: every rank has those of its
own H/N heads, and is left with those of all, by the group's all-gather from a copy (as SGLang's of
MLA are) and by `symm`'s kernel. Every bit is checked.

With `--op values` MLA's value projection is timed with the exchange, in both orders
(`--dcp-replicate-v-proj`): from partial latents of all heads to the values of a rank's own.

Each output is poisoned and checked against float64 before it is timed. On GPUs a sample is the
replay of a CUDA graph where capture works, else the calls one by one. A sample counts for as long
as the slowest rank took. Inputs lie in the cache, as attention leaves them there.

With fewer GPUs than ranks, ranks share GPUs, and without GPUs they exchange over gloo: what is
exchanged is the same, its speed says nothing, and every line is marked "function only".
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from unittest import mock

import torch

from benchmark.dcp import report
from benchmark.dcp.collectives_rank import figures_in, run_rank
from benchmark.dcp.collectives_report import (
    HEAD,
    MARK,
    Row,
    plot,
    reason_of_mark,
    shares_gpus,
    table_line,
)
from benchmark.dcp.kernels_stage import SHAPES

# Ranks that share a GPU: NCCL lets them from this version on, with a few blocks each, or they
# fill it and wait for each other.
SHARING_NCCL = (2, 30)
SHARING_ENV = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_MAX_CTAS": "4",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
}


def run_ranks(ranks: int, options: argparse.Namespace, *, symmetric: bool = False) -> list[Row]:
    """Measure a group of so many new processes; none is left behind.

    symmetric: those that need NCCL's symmetric memory, in place of ours and SGLang's.

    Raises TimeoutError after the timeout, and what a rank raised.
    """
    env = {"OMP_NUM_THREADS": "1"}
    if shares_gpus(options.device, ranks):
        env |= SHARING_ENV
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, env):
        context = torch.multiprocessing.start_processes(
            run_rank,
            (options, ranks, folder, symmetric),
            nprocs=ranks,
            join=False,
            start_method="spawn",
        )
        assert context is not None
        deadline = time.monotonic() + options.timeout
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"{ranks} ranks did not finish within --timeout {options.timeout} s"
                    )
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return report.read_csv(figures_in(folder), Row)


def groups_that_exist(device: str, shapes: list[str]) -> list[int]:
    """Powers of two up to the number of GPUs; two ranks where there are fewer than two."""
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    most = min(max(2, gpus), *(SHAPES[shape][0] for shape in shapes))
    return [2**power for power in range(1, most.bit_length())]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.dcp collectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=here)
    parser.add_argument("--op", choices=["exchange", "gather", "values"], default="exchange")
    parser.add_argument(
        "--variants", action="store_true", help="the experiments with symm's kernel too"
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES)
    parser.add_argument(
        "--ranks", nargs="+", type=int, metavar="N", help="powers of two up to the GPUs; at least 2"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256], metavar="B")
    parser.add_argument("--samples", type=int, default=20, help="per candidate and turn, 2 turns")
    parser.add_argument("--eager", action="store_true", help="capture no CUDA graphs")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each group size")
    report.add_files(parser)
    options = parser.parse_args(argv)
    options.shape = options.shape or (["mla"] if options.op == "values" else list(SHAPES))
    if options.op == "values" and options.shape != ["mla"]:
        parser.error(f"--shape {' '.join(options.shape)}: --op values is of mla alone")
    ranks = options.ranks or groups_that_exist(options.device, options.shape)
    if options.samples < 2:
        parser.error(f"--samples {options.samples}: at least 2 are needed for percentiles")
    if min(options.batch) < 1:
        parser.error(f"--batch {min(options.batch)}: at least one token is exchanged")
    for shape in options.shape:
        for N in ranks:
            if N < 2 or SHAPES[shape][0] % N:
                parser.error(
                    f"--ranks {N} cannot share the {SHAPES[shape][0]} heads of {shape}: use a "
                    "divisor of at least 2"
                )
    if not options.from_csv:
        check_machine(parser, options.device, ranks)

    rows: list[Row] = []
    print(HEAD, flush=True)
    if options.from_csv:
        rows = [row for path in options.from_csv for row in report.read_csv(path, Row)]
        print("\n".join(map(table_line, rows)))
    else:
        for N in ranks:
            if why := reason_of_mark(options.device, N):
                print(f"{MARK}: {why}", flush=True)
            rows += run_ranks(N, options)
            if options.op == "exchange":
                rows += symmetric_rows(N, options)
    if options.csv:
        report.write_csv(rows, options.csv, Row)
        print(f"figures: {options.csv}")
    if options.plot:
        print(plot(rows, options.plot))
    return 0


def symmetric_rows(ranks: int, options: argparse.Namespace) -> list[Row]:
    """Figures of the peers that need NCCL's symmetric memory; none, with the reason said."""
    problem = "they need a GPU for each rank"
    if options.device == "cuda" and not shares_gpus(options.device, ranks):
        try:
            return run_ranks(ranks, options, symmetric=True)
        except Exception as error:  # of any rank; what has been measured stays
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    print(f"not measured: flashinfer, torch all_to_all_nd ({problem})", flush=True)
    return []


def check_machine(parser: argparse.ArgumentParser, device: str, ranks: list[int]) -> None:
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device: use --device cpu, with a small --batch")
    if shares_gpus(device, max(ranks)) and torch.cuda.nccl.version() < SHARING_NCCL:
        parser.error(
            f"--ranks {max(ranks)} on {torch.cuda.device_count()} GPU(s): ranks share a GPU from "
            f"NCCL {'.'.join(map(str, SHARING_NCCL))} on, and this is "
            f"{'.'.join(map(str, torch.cuda.nccl.version()))}; install a newer nvidia-nccl"
        )
