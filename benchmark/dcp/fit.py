"""Fit the cost model of `layout` to measured servers, and say where it misses.

    python -m benchmark.dcp fit docs/figures/serve-*.csv        python/sglang_helix/cost.json anew

The parameters of `sglang_helix.cost` by least squares of relative errors over every measured row of
`serve`'s CSV files. Rows of prefixes that requests share are left out: what they read of the cache
is not what they hold. Servers were measured with up to 8 requests, whose exchange and gather are
all latency; their bandwidths are those of `collectives` between the two largest batches. What the
figures do not tell apart (MLA has come with experts alone) stays near START, which is what so many
launches take. Exits 1, and writes nothing, where a row is missed by more than --bound.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares
from sglang_helix import cost
from sglang_helix.layout import CACHE_BYTES, Shape, rows

from benchmark.dcp.layouts import GATHERED, REPLICATED, parse_layout

BOUND = 0.15
# FA3's decode of MLA with 128 heads over 8 x 128K tokens took 500 us on an H200, 584 TFLOP/s (522
# us in measured.json since). Of the figures 8 layers of DeepSeek-V3, sharded, alone are bound so.
ARITHMETIC = 0.59
ROOT = Path(__file__).parents[2]
COLLECTIVES = ROOT / "docs/figures/collectives-h200x4.csv"
GATHER = ROOT / "docs/figures/gather-h200x2.csv"
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
            if row["queries"] == GATHERED:
                raise ValueError(
                    f"{path}: of servers elsewhere, which do not say what gathers queries"
                )
            tp_size, kvp_size = int(row["tp_size"]), int(row["dcp_size"])
            flags = parse_layout(row["layout"], tp_size).flags
            given = dict(zip(flags[::2], flags[1::2], strict=True))
            listed = rows(model(row["model"]).shape, tp_size, 0, CACHE_BYTES["bf16"])
            choice = cost.Choice(
                next(place for place in listed if place.layout.kvp_size == kvp_size),
                exchange=row["comm"] if kvp_size > 1 else "",
                replicated=row["queries"] == REPLICATED,
                gather=row["queries"],
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


def links(*paths: Path) -> dict[str, float]:
    """By exchange and gather, the share of the vendor's bandwidth that MLA's rows go at."""
    found: dict[str, list[tuple[float, float]]] = {}
    for path in paths:
        with path.open() as file:
            for row in csv.DictReader(file):
                by, _, name = row["name"].partition(" ")
                if by != "helix" or row["shape"] != "mla":
                    continue
                name = _GATHERS.get(name, name)
                sent = int(row["batch"]) * _sent(name, int(row["heads"]), int(row["ranks"]))
                gpu = cost.GPUS[row["device"].split()[1].lower()]
                least_us = sent / (gpu.link_gb_s * 1e3)
                found.setdefault(name, []).append((least_us, float(row["median_us"])))
    shares = {}
    for name, times in found.items():
        (fewer, less), (more, longer) = sorted(times)[-2:]
        shares[name] = float(f"{(more - fewer) / (longer - less):.4g}")
    return shares


_GATHERS = {"symm gather": cost.BY_KERNEL}  # as `collectives --op gather` calls it


def _sent(name: str, heads: int, ranks: int) -> int:
    """Bytes that a rank sends of one token of MLA."""
    listed = rows(Shape(heads, None, 576, 512, 576, 1), ranks, 0, CACHE_BYTES["bf16"])
    wire = next(row.wire_bytes for row in listed if row.layout.kvp_size == ranks)
    if name in (cost.BY_KERNEL, cost.BY_NCCL):
        return wire["a2a"] - wire["a2a+q"]
    return wire["ag_rs+q" if name == "ag_rs" else "a2a+q"]


# Where the fit starts, and how far a parameter's relative distance from there weighs beside a
# row's relative error: little, so that it decides where no row does.
START = {
    "host": 2500.0,
    "layer": 30.0,
    "mla": 8.0,
    "moe": 40.0,
    "recurrent": 20.0,
    "attention": 10.0,
    "exchange": 8.0,
    "gather": 5.0,
    "weights": 0.7,
    "cache": 0.8,
}
PULL = 0.05
MOST = {"host": 5000.0, "weights": 1.0, "cache": 1.0}  # of others: 500 us


def fit(figures: Sequence[Measured], link: dict[str, float]) -> cost.Parameters:
    """Least squares over the logarithms of parameters, which are positive, and of times."""
    several = {
        "host": [cost.PLAIN, cost.SHARDED],
        "attention": sorted({row.backend for row in figures}),
        "exchange": sorted({row.choice.exchange for row in figures} - {""}),
        "gather": [cost.BY_KERNEL, cost.BY_NCCL],
    }
    names = [name for name in START for _ in several.get(name, [""])]
    start, most = (np.log([of(name) for name in names]) for of in (START.get, _most))

    def unpack(values: Iterable[float]) -> cost.Parameters:
        left = iter(values)
        by_name: dict[str, Any] = {
            name: {key: next(left) for key in several[name]} if name in several else next(left)
            for name in START
        }
        return cost.Parameters(**by_name, arithmetic=ARITHMETIC, link=link)

    def errors(logarithms: Any) -> list[float]:
        parameters = unpack(np.exp(logarithms).tolist())
        missed = [float(np.log(row.predicted(parameters) / row.ms)) for row in figures]
        return [*missed, *(PULL * (logarithms - start))]

    found = least_squares(errors, start, bounds=(np.log(1e-3), most))
    return unpack(float(f"{value:.4g}") for value in np.exp(found.x))


def _most(name: str) -> float:
    return MOST.get(name, 500.0)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.dcp fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", nargs="+", type=Path, metavar="CSV")
    parser.add_argument(
        "--collectives", nargs="+", type=Path, default=[COLLECTIVES, GATHER], metavar="CSV"
    )
    parser.add_argument("--out", type=Path, default=cost.PARAMETERS)
    parser.add_argument("--bound", type=float, default=BOUND, help="relative; default: %(default)s")
    options = parser.parse_args(argv)
    figures = [row for path in options.figures for row in measured(path)]
    parameters = fit(figures, links(*options.collectives))
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
