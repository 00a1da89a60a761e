"""`python -m benchmark.dcp kernels` on a CPU, with few and small sizes, so that it cannot rot."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_helix.srt.layers.dcp import symm_launch
from sglang_helix.srt.layers.dcp.symm_layout import Layout
from sglang_helix.srt.layers.dcp.symm_workspace import one_device

from benchmark.dcp import kernels, kernels_candidates, kernels_stage, report

ROOT = Path(__file__).parents[3]
SIZES = ["--ranks", "2", "8", "--batch", "1", "3", "--samples", "2"]


def benchmark(*args: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmark.dcp", *map(str, args)]
    return subprocess.run(
        command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "figures.csv"
    ran = benchmark("kernels", "--device", "cpu", "--shape", "gqa", *SIZES, "--csv", path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return path


def test_measures_every_operation(figures: Path) -> None:
    rows = report.read_csv(figures)
    measured = {(row.op, row.ranks, row.batch) for row in rows}
    of_gqa = kernels_candidates.OPERATIONS.keys() - {"values", *kernels_candidates.ASKED_FOR}
    assert measured == {(op, N, B) for op in of_gqa for N in (2, 8) for B in (1, 3)}
    for row in rows:
        assert 0 < row.p10_us <= row.median_us <= row.p90_us
        assert row.device == "CPU"
        assert (row.error is None) == (row.name == report.COPY)
        assert row.error is None or row.error <= kernels.BOUND


def test_what_stops_a_run_loses_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.measure_problem

    def until_batch_2(op: str, p: kernels_stage.Problem, *args: Any) -> list[report.Row]:
        if p.batch == 2:
            raise AssertionError(f"{op}: wrong")
        return real(op, p, *args)

    monkeypatch.setattr(kernels, "measure_problem", until_batch_2)
    path = tmp_path / "figures.csv"
    sizes = ["--shape", "gqa", "--ranks", "2", "--batch", "1", "2", "--samples", "2"]
    with pytest.raises(AssertionError, match="combine: wrong"):
        kernels.main(["--device", "cpu", "--op", "combine", *sizes, "--csv", str(path)])
    assert {row.batch for row in report.read_csv(path)} == {1}


def test_values_are_projected_in_both_orders(tmp_path: Path) -> None:
    sizes = ["--shape", "mla", "gqa", "--ranks", "8", "--batch", "1", "--samples", "2"]
    path = tmp_path / "values.csv"
    assert kernels.main(["--device", "cpu", "--op", "values", *sizes, "--csv", str(path)]) == 0
    orders = {f"helix a2a, projected {order}" for order in ("before", "behind")}
    measured = {(row.shape, row.name) for row in report.read_csv(path)}
    assert measured == {("mla", name) for name in (*orders, report.COPY)}


def test_a_cap_is_of_all_ranks_that_share_a_device() -> None:
    workspace = one_device(Layout(4, 8, 16, kernels_stage.DTYPE, 2), torch.device("cpu"), 2112)
    assert kernels_stage.capped(workspace, 32).warps == 128
    assert kernels_stage.capped(workspace, None) is workspace
    assert kernels_stage.WARPS_PER_SM == symm_launch._WARPS_PER_SM
    for variant in kernels_stage.VARIANTS.values():
        attributes = {name: value for name, value in variant.items() if name != "sms"}
        assert Layout(4, 8, 16, kernels_stage.DTYPE, 2, **attributes).nbytes > 0


def test_leaves_out_what_no_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = SimpleNamespace(total_memory=139 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    sizes = kernels_stage.SHAPES["mla"]

    def fits(op: str, ranks: int, device: str = "cuda") -> bool:
        problem = kernels_stage.Problem("mla", *sizes, ranks, 4096, torch.device(device))
        return kernels_candidates.fits(op, problem)

    assert fits("exchange", 8)
    assert not fits("exchange", 16)
    assert fits("layer", 16)
    assert fits("exchange", 16, "cpu")


def test_reports_on_earlier_figures(figures: Path, tmp_path: Path) -> None:
    plot, again = tmp_path / "figures.png", tmp_path / "again.csv"
    ran = benchmark("kernels", "--from-csv", figures, "--csv", again, "--plot", plot)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert again.read_text() == figures.read_text()
    assert plot.exists() == (importlib.util.find_spec("matplotlib") is not None)
    assert plot.exists() or "matplotlib is not installed" in ran.stdout


def test_summary_compares_with_the_fastest_peer() -> None:
    def row(name: str, median: float, share: float) -> report.Row:
        return report.Row(
            op="combine",
            shape="mla",
            heads=8,
            head_dim=4,
            ranks=2,
            batch=1,
            name=name,
            launches=1,
            p10_us=median,
            median_us=median,
            p90_us=median,
            moved_bytes=1,
            copy_share=share,
            error=0.0,
            rotated_mib=1.0,
            device="",
            software="",
        )

    text = report.summary([row("helix", 2.0, 0.5), row("slow", 9.0, 0.1), row("fast", 3.0, 0.3)])
    assert "1.50 at worst [mla, N 2, B 1] (fast / helix)" in text
    assert "at least 50% of the copy's bandwidth" in text


def test_nan_is_an_infinite_error() -> None:
    want = torch.ones(2, dtype=torch.float64)
    nan = torch.tensor([1.0, math.nan])
    assert kernels.relative_error(want, want) == 0
    assert max(kernels.relative_error(out, want) for out in (want, nan)) == math.inf


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--ranks", "3", "--device", "cpu"], "--ranks 3 does not divide the 128 heads of mla"),
        (["--samples", "1", "--device", "cpu"], "--samples 1"),
    ],
)
def test_refuses_what_it_cannot_measure(args: list[str], names: str) -> None:
    ran = benchmark("kernels", *args)
    assert ran.returncode == 2
    assert names in ran.stderr


def test_help_of_the_command_and_of_its_parts() -> None:
    assert "kernels" in benchmark("--help").stdout
    assert "--from-csv" in benchmark("kernels", "--help").stdout
