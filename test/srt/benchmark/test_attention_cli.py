"""`python -m benchmark.dcp attention` in Triton's interpreter, at one small size of each kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sglang.srt import runtime_context
from sglang_helix.srt.layers.attention import adapters

from benchmark.dcp import attention, report

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "figures.csv"
    command = [sys.executable, "-m", "benchmark.dcp", "attention", "--quick", "--device", "cpu"]
    ran = subprocess.run(
        [*command, "--csv", path],
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return path


def test_an_adapter_and_its_plain_twin_are_right_and_timed(figures: Path) -> None:
    rows = report.read_csv(figures, attention.Row)
    names = ("triton", "triton tp", report.COPY)
    assert [(row.heads, row.name) for row in rows] == [
        (heads, name) for heads in attention.QUICK for name in names
    ]
    for row in rows:
        assert 0 < row.p10_us <= row.median_us <= row.p90_us
        assert (row.error is None) == (row.name == report.COPY)
        assert row.error is None or row.error <= attention.BOUND[torch.float32]


def test_reports_on_earlier_figures(
    figures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.csv"
    assert attention.main(["--from-csv", str(figures), "--csv", str(again)]) == 0
    assert again.read_text() == figures.read_text()
    said = capsys.readouterr().out
    assert "triton over its backend's plain TP: " in said
    assert "triton over the fastest plain TP: " in said


@pytest.mark.parametrize("heads", attention.SHAPES.values(), ids=str)
def test_a_new_record_is_measured_by_being_there(
    heads: attention.Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = adapters.Adapter("new", base2=False, gqa=("a:B",), mla=("a:B",))
    monkeypatch.setattr(adapters, "ADAPTERS", (*adapters.ADAPTERS, new))
    hopper = SimpleNamespace(is_cuda=True, device_sm=90)
    monkeypatch.setattr(runtime_context, "get_platform", lambda: hopper)
    problem = attention.Problem(heads, 1, 1, torch.device("cuda"))
    names = [candidate.name for candidate in attention.candidates(problem, with_variants=True)]
    assert len(set(names)) == len(names)
    assert {"new", "new tp", "triton", "triton tp", "triton, 8 splits", "fa3 tp"} <= set(names)
    assert ("flashmla tp" in names) == (heads.kv == 0)
    assert "trtllm_mla" not in names


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--device", "cpu", "--samples", "1"], "--samples 1"),
        (["--device", "cpu", "--tokens", "0"], "must be positive, got 0"),
        (["--shape", "63/8"], "invalid choice"),
    ],
)
def test_refuses_what_it_cannot_measure(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        attention.main(args)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
