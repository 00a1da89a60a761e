"""Decode attention over a shard of the cache, as the adapters call it, on one device.

    python -m benchmark.dcp attention                            the full run, on a GPU
    python -m benchmark.dcp attention --variants                 and the Triton adapter's choices
    TRITON_INTERPRET=1 python -m benchmark.dcp attention --quick --device cpu        anywhere

Anywhere, kernels that have stand-ins run on these where SGLANG_CPU_REFERENCE_STAND_INS names their
backends (docs/how-it-works.md).

For the heads that a rank attends with (H query on G key-value heads; MLA: H on one latent), a batch
of requests and their local tokens, each candidate takes one query token of every request to (out,
LSE) over tokens that lie scattered in a pool of SGLang's:

    NAME        the adapter of that backend, or SGLang's own class where it is complete upstream:
                K = 2, rank 0, with the metadata that a captured graph has
    NAME tp     what plain TP of that backend calls at the same local tokens: the bound of NAME
    copy        a device-to-device copy of as many bytes as the keys and values have

Candidates come from the table of adapters and run without a server: SGLang's classes are built on a
published configuration, a pool and a table of requests. Each layer of the pool is a set of buffers;
together they exceed the L2. Poisoned outputs are checked against fp32 before anything is timed; a
candidate that is wrong is left out and makes the exit status 1.
Neither the write of the new token nor the exchange is timed.

Rows go to the CSV and to stdout size by size; what is said on the way goes to stderr.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from sglang_helix.srt.layers.attention import measured

from benchmark.dcp import measure, report
from benchmark.dcp.attention_candidates import candidates, stand_ins
from benchmark.dcp.attention_report import Row, Table, ours, plot, say, ship, summary
from benchmark.dcp.attention_stage import Cache, Heads, Problem, Stage
from benchmark.dcp.kernels import device_name, relative_error, software

BOUND = {torch.bfloat16: 8e-3, torch.float32: 5e-6}


SHAPES = {
    heads.name: heads
    for heads in (
        *(Heads(64, 8), Heads(32, 4), Heads(16, 1), Heads(8, 1)),
        *(Heads(128, 0), Heads(16, 0)),
    )
}
QUICK = {heads.name: heads for heads in (Heads(4, 2, 16), Heads(4, 0))}


class Bench:
    """Problems one after the other, and what is remembered between them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.samples, self.variants, self.quick = options.samples, options.variants, options.quick
        self.longest = max(options.tokens)
        self.launches: dict[tuple[str, str], int | None] = {}
        # Whether an adapter of the series was not measured, or any candidate was wrong.
        self.failed = False
        self.refused: dict[tuple[str, str], str] = {}

    def measure(self, p: Problem) -> list[Row]:
        layers = 1 if self.quick else measure.sets_to_rotate(p.device, p.moved)
        cache = Cache(p, layers)
        rotations: dict[str, measure.Rotation] = {}
        errors: dict[str, float] = {}
        for candidate in candidates(p, self.variants):
            key = p.heads.name, candidate.name
            if key in self.refused:
                continue
            try:
                with Stage(cache, candidate.ranks, candidate.backend, self.longest) as stage:
                    call = candidate.build(stage)
                    calls = [partial(stage.call, call, number) for number in range(layers)]
                    rotation = measure.Rotation(calls, p.device)
                    got = [out.clone() for out in rotation.checked_outputs()]
                    if key not in self.launches:
                        self.launches[key] = measure.launches(calls[0])
            except Exception as failure:
                # A peer that is not installed, or does not take this shape, is no failure of ours.
                self.failed |= candidate.name in {record.name for record in ours()}
                reason = (str(failure).strip().splitlines() or [""])[0][:200]
                self.refused[key] = f"{type(failure).__name__}: {reason}"
                say(f"not measured: {candidate.name} of {key[0]} ({self.refused[key]})")
                continue
            error = max(map(relative_error, got, cache.want))
            if not error <= BOUND[p.dtype]:
                self.failed = True
                say(f"WRONG: {candidate.name} at {p}: relative error {error:.3g}; not timed")
                continue
            rotations[candidate.name], errors[candidate.name] = rotation, error
        source = torch.empty((layers, 2, p.moved // 2), dtype=torch.uint8, device=p.device)
        rotations[report.COPY] = measure.Rotation(
            [partial(target.copy_, whence) for whence, target in source], p.device
        )
        timings = measure.take_turns(rotations, self.samples)
        return [
            Row(
                heads=p.heads.name,
                batch=p.batch,
                tokens=p.tokens,
                name=name,
                launches=self.launches.get((p.heads.name, name)),
                p10_us=timing.p10,
                median_us=timing.median,
                p90_us=timing.p90,
                moved_bytes=p.moved,
                copy_share=timings[report.COPY].median / timing.median,
                error=errors.get(name),
                rotated_mib=layers * p.moved / 2**20,
                device=device_name(p.device),
                software=software(),
            )
            for name, timing in timings.items()
        ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.dcp attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="H/G")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], metavar="B")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 32768, 131072], help="local ones"
    )
    parser.add_argument("--variants", action="store_true", help="the Triton adapter's choices too")
    parser.add_argument("--quick", action="store_true", help="few and small sizes, in seconds")
    parser.add_argument("--samples", type=int, default=10, help="per candidate and turn, 2 turns")
    report.add_files(parser)
    parser.add_argument(
        "--ship",
        type=int,
        metavar="MAJOR",
        help="of the GPU's compute capability: write the adapters' times where servers read them",
    )
    options = parser.parse_args(argv)
    shapes = SHAPES if not options.quick else QUICK
    if options.quick:
        options.batch, options.tokens, options.samples = [2], [33], 2
    if options.quick and options.ship:
        parser.error("--ship: the figures of --quick are no server's")
    if options.samples < 2:
        parser.error(f"--samples {options.samples}: at least 2 are needed for percentiles")
    for size in (*options.batch, *options.tokens):
        if size < 1:
            parser.error(f"--batch and --tokens must be positive, got {size}")
    if options.from_csv:
        rows, failed = [row for path in options.from_csv for row in report.read_csv(path, Row)], 0
        Table().print(rows)
        if options.csv:
            report.write_csv(rows, options.csv, Row)
    else:
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("no CUDA device: use TRITON_INTERPRET=1, --device cpu and --quick")
        chosen = list(shapes) if options.quick else options.shape or list(shapes)
        rows, failed = run(options, [shapes[name] for name in chosen])
    print(summary(rows))
    if options.csv:
        print(f"figures: {options.csv}")
    if options.plot:
        print(plot(rows, options.plot))
    if options.ship:
        ship(rows, options.ship)
        print(f"servers read: {measured.FILE}")
    return int(failed)


def run(options: argparse.Namespace, shapes: list[Heads]) -> tuple[list[Row], bool]:
    """All figures, and whether an adapter was not measured or a candidate was wrong.

    The figures of a size are in the table and in the CSV before the next size begins.
    """
    device = torch.device(options.device)
    torch.set_grad_enabled(False)
    if device.type == "cpu" and stand_ins():
        from sglang_cpu_reference import stand_ins as kernels

        kernels.install()
    print(f"{device_name(device)}, {software()}", flush=True)
    bench, lines, rows = Bench(options), Table(), []
    if options.csv:
        report.write_csv([], options.csv, Row)
    for heads in shapes:
        for batch in options.batch:
            for tokens in options.tokens:
                started = time.monotonic()
                found = bench.measure(Problem(heads, batch, tokens, device))
                spent = time.monotonic() - started
                lines.print(found)
                if options.csv:
                    report.write_csv(found, options.csv, Row, append=True)
                rows += found
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # of graphs that are gone
                say(f"{heads.name} B={batch} tokens={tokens}: {spent:.1f} s")
    return rows, bench.failed
