"""Fit the cost model of `layout` to measured servers, and say where it misses.

    python -m benchmark.dcp fit docs/figures/serve-*.csv        python/sglang_helix/cost.json anew

The parameters of `sglang_helix.cost` by least squares of relative errors over every measured row of
`serve`'s CSV files. Rows of prefixes that requests share are left out: what they read of the cache
is not what they hold. Servers were measured with up to 8 requests, whose exchange is all latency;
its bandwidth is that of `collectives` between batch 256 and 1024. Exits 1, and writes nothing,
where a row is missed by more than --bound.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from sglang_helix import cost
from sglang_helix.layout import CACHE_BYTES, Shape, rows

from benchmark.dcp.layouts import parse_layout

BOUND = 0.15
# FA3's decode of MLA with 128 heads over 8 x 128K tokens took 500 us on an H200 (measured.json):
# 584 TFLOP/s. No server of the figures has heads enough to be bound by arithmetic.
ARITHMETIC = 0.59
ROOT = Path(__file__).parents[2]
COLLECTIVES = ROOT / "docs/figures/collectives-h200x4.csv"
DEFAULT_BACKEND = "flashinfer"  # of the files whose layouts name none: docs/benchmarks.md


class Measured(NamedTuple):
    """One row of a figure: its place, what ran, and milliseconds per token."""

    file: str
    model: str
    layout: str
    choice: cost.Choice
    gpu: cost.Gpu
    backend: str
    context: int
    requests: int
    ms: float

    def predicted(self, parameters: cost.Parameters) -> float:
        return cost.step_ms(
            model(self.model),
            self.choice,
            self.gpu,
            parameters,
            context=self.context,
            requests=self.requests,
            backend=self.backend,
        )


@functools.cache
def model(path: str) -> cost.Model:
    """A model of benchmark/dcp/models, as the files name it."""
    from sglang.srt.configs.model_config import ModelConfig

    return cost.model_of(ModelConfig(str(ROOT / path)))


def measured(path: Path) -> list[Measured]:
    """The rows of a file of `serve` that have a time."""
    found = []
    with path.open() as file:
        for row in csv.DictReader(file):
            if row["status"] != "measured" or row["prefix"] == "shared":
                continue
            tp_size, kvp_size = int(row["tp_size"]), int(row["dcp_size"])
            flags = parse_layout(row["layout"], tp_size).flags
            given = dict(zip(flags[::2], flags[1::2], strict=True))
            listed = rows(model(row["model"]).shape, tp_size, 0, CACHE_BYTES["bf16"])
            choice = cost.Choice(
                next(place for place in listed if place.layout.kvp_size == kvp_size),
                exchange=row["comm"] if kvp_size > 1 else "",
                replicated="--attn-tp-size" in given,
            )
            name = next(name for name in cost.GPUS if name.upper() in row["device"].split())
            found.append(
                Measured(
                    path.name,
                    row["model"],
                    row["layout"],
                    choice,
                    cost.GPUS[name],
                    given.get("--attention-backend", DEFAULT_BACKEND),
                    int(row["context"]),
                    int(row["concurrency"]),
                    float(row["tpot_median_ms"]),
                )
            )
    return found


def links(path: Path) -> dict[str, float]:
    """By exchange, the share of the vendor's bandwidth that MLA's rows go at."""
    times: dict[str, dict[int, float]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            by, name = row["name"].split()
            if by == "helix" and row["shape"] == "mla":
                times.setdefault(name, {})[int(row["batch"])] = float(row["median_us"])
                ranks, heads = int(row["ranks"]), int(row["heads"])
                gpu = cost.GPUS[row["device"].split()[1].lower()]
    shape = Shape(heads, None, 576, 512, 576, 1)
    listed = rows(shape, ranks, 0, CACHE_BYTES["bf16"])
    sent = next(row.wire_bytes for row in listed if row.layout.kvp_size == ranks)
    found = {}
    for name, by_batch in times.items():
        row_bytes = sent["ag_rs+q" if name == "ag_rs" else "a2a+q"]
        rate = (1024 - 256) * row_bytes / (by_batch[1024] - by_batch[256])
        found[name] = float(f"{rate / (gpu.link_gb_s * 1e3):.4g}")
    return found


def fit(figures: Sequence[Measured], link: dict[str, float]) -> cost.Parameters:
    """Least squares over the logarithms of parameters, which are positive, and of times."""
    backends = sorted({row.backend for row in figures})
    exchanges = sorted({row.choice.exchange for row in figures} - {""})

    def unpack(values: Sequence[float]) -> cost.Parameters:
        left = iter(values)
        return cost.Parameters(
            layer=next(left),
            mla=next(left),
            moe=next(left),
            attention={name: next(left) for name in backends},
            exchange={name: next(left) for name in exchanges},
            gather=next(left),
            weights=next(left),
            cache=next(left),
            arithmetic=ARITHMETIC,
            link=link,
        )

    times = [30, 5, 40, *[10] * len(backends), *[8] * len(exchanges), 5]
    start, most = [*times, 0.7, 0.8], [500] * len(times) + [1, 1]

    def errors(logarithms: Sequence[float]) -> list[float]:
        parameters = unpack(np.exp(logarithms).tolist())
        return [float(np.log(row.predicted(parameters) / row.ms)) for row in figures]

    found = least_squares(errors, np.log(start), bounds=(np.log(1e-3), np.log(most)))
    return unpack([float(f"{value:.4g}") for value in np.exp(found.x)])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.dcp fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--collectives", type=Path, default=COLLECTIVES, metavar="CSV")
    parser.add_argument("--out", type=Path, default=cost.PARAMETERS)
    parser.add_argument("--bound", type=float, default=BOUND, help="relative; default: %(default)s")
    options = parser.parse_args(argv)
    figures = [row for path in options.figures for row in measured(path)]
    parameters = fit(figures, links(options.collectives))
    missed = []
    for row in figures:
        ms = row.predicted(parameters)
        error = ms / row.ms - 1
        print(
            f"{row.file:42} {row.layout:20} {row.context:8} {row.requests:3} "
            f"{row.ms:7.2f} ms, by the model {ms:7.2f} ({error:+.1%})"
        )
        if abs(error) > options.bound:
            missed.append(row)
    if missed:
        print(f"{len(missed)} of {len(figures)} rows are missed by more than {options.bound:.0%}")
        return 1
    options.out.write_text(json.dumps(parameters._asdict(), indent=1) + "\n")
    print(f"{len(figures)} rows within {options.bound:.0%}: {options.out}")
    return 0
