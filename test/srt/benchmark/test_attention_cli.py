"""`python -m benchmark.dcp attention` at one small size of each kind.

Triton's kernels run in its interpreter, those of other backends are stand-ins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from sglang.srt import runtime_context
from sglang_cpu_reference import stand_ins
from sglang_helix.srt.layers.attention import adapters, measured
from srt.fresh import Fresh

from benchmark.dcp import (
    attention,
    attention_candidates,
    attention_report,
    attention_stage,
    report,
)
from benchmark.dcp.__main__ import main


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "figures.csv"
    command = ["attention", "--quick", "--device", "cpu", "--csv", str(path)]
    kernels = {stand_ins.VARIABLE: "fa3,fa4,flashinfer,flashmla"}
    with Fresh("cpu_reference", 500, interpreted=True) as process:
        ran = process.outcome(main, command, **kernels)
    assert ran.value == 0, ran.output[-3000:]
    return path


def test_an_adapter_and_its_plain_twin_are_right_and_timed(figures: Path) -> None:
    rows = report.read_csv(figures, attention_report.Row)
    expected = []
    for heads in attention.QUICK.values():
        of_mla = () if heads.kv else ("flashmla",)
        names = ["fa3", "fa4", "flashinfer", *of_mla, "triton"]
        # SGLang makes no FA3 where there is no GPU.
        peers = [f"{name} tp" for name in names if name != "fa3"]
        expected += [(heads.name, name) for name in (*names, *peers, report.COPY)]
    assert [(row.heads, row.name) for row in rows] == expected
    for row in rows:
        assert 0 < row.p10_us <= row.median_us <= row.p90_us
        assert (row.error is None) == (row.name == report.COPY)
        assert row.error is None or row.error <= attention.BOUND[torch.float32]


class Unstaged:
    """A stage of candidates that need nothing of SGLang's."""

    def __init__(self, cache: attention_stage.Cache, *_: object) -> None:
        self.cache = cache

    def __enter__(self) -> Unstaged:
        return self

    def __exit__(self, *_: object) -> None: ...

    def call(self, call: attention_stage.Call, number: int) -> torch.Tensor:
        return call(number)


def scaled(name: str, factor: float) -> attention_candidates.Candidate:
    """A candidate that gives the right outputs times a factor."""
    return attention_candidates.Candidate(
        name, 1, "", lambda stage: lambda number: factor * stage.cache.want[0]
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Arguments of a run with one right and one wrong candidate."""
    found = [scaled("wrong", 1.1), scaled("right", 1.0)]
    monkeypatch.setattr(attention, "Stage", Unstaged)
    monkeypatch.setattr(attention, "candidates", lambda *_: iter(found))
    with torch.no_grad():  # ends what the run sets
        yield ["--quick", "--device", "cpu", "--csv", str(tmp_path / "figures.csv")]


def test_a_wrong_candidate_is_named_and_left_out(
    quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert attention.main(quick) == 1
    rows = report.read_csv(Path(quick[-1]), attention_report.Row)
    assert [(row.heads, row.name) for row in rows] == [
        (heads, name) for heads in attention.QUICK for name in ("right", report.COPY)
    ]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WRONG")]
    for line, heads in zip(said, attention.QUICK.values(), strict=True):
        assert line.startswith(f"WRONG: wrong at Problem(heads={heads}, batch=2, tokens=33, ")
        assert "relative error 0.1;" in line


def test_a_crash_loses_no_figures(
    quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crashing(p: attention_stage.Problem, _: bool) -> Iterator[attention_candidates.Candidate]:
        yield scaled("right", 1.0)
        if not p.heads.kv:
            raise KeyboardInterrupt

    monkeypatch.setattr(attention, "candidates", crashing)
    with pytest.raises(KeyboardInterrupt):
        attention.main(quick)
    rows = report.read_csv(Path(quick[-1]), attention_report.Row)
    assert [(row.heads, row.name) for row in rows] == [("4/2", "right"), ("4/2", report.COPY)]
    _, head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["heads", "B", "tokens", "right", report.COPY]
    assert line.split()[:3] == ["4/2", "2", "33"]


def test_reports_on_earlier_figures(
    figures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.csv"
    assert attention.main(["--from-csv", str(figures), "--csv", str(again)]) == 0
    assert again.read_text() == figures.read_text()
    said = capsys.readouterr().out
    assert "triton over its backend's plain TP: " in said
    assert "triton over the fastest plain TP: " in said


def test_ships_the_adapters_times_by_heads(figures: Path, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    old = measured.Figures(device="old", major=8, us={"triton": {"1 x 1": 1.0}})
    path.write_text(json.dumps({"4/2": old, "64/8": old}))
    rows = report.read_csv(figures, attention_report.Row)
    attention_report.ship(rows, 9, path)
    shipped = json.loads(path.read_text())
    assert shipped["64/8"] == old
    assert set(shipped) == {"64/8", *attention.QUICK}
    assert shipped["4/2"]["major"] == 9
    assert set(shipped["4/2"]["us"]) == {"fa3", "fa4", "flashinfer", "triton"}
    (row,) = (row for row in rows if (row.heads, row.name) == ("MLA 4", "flashmla"))
    assert shipped["MLA 4"]["us"]["flashmla"] == {"2 x 33": pytest.approx(row.median_us, rel=1e-3)}


@pytest.mark.parametrize("heads", attention.SHAPES.values(), ids=str)
def test_a_new_record_is_measured_by_being_there(
    heads: attention_stage.Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = adapters.Adapter("new", base2=False, gqa=("a:B",), mla=("a:B",))
    monkeypatch.setattr(adapters, "ADAPTERS", (*adapters.ADAPTERS, new))
    hopper = SimpleNamespace(is_cuda=True, device_sm=90)
    monkeypatch.setattr(runtime_context, "get_platform", lambda: hopper)
    problem = attention_stage.Problem(heads, 1, 1, torch.device("cuda"))
    names = [candidate.name for candidate in attention.candidates(problem, with_variants=True)]
    assert len(set(names)) == len(names)
    assert {"new", "new tp", "triton", "triton tp", "triton, 8 splits", "fa3 tp"} <= set(names)
    assert ("flashmla tp" in names) == (heads.kv == 0)
    assert "trtllm_mla" not in names


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--device", "cpu", "--samples", "1"], "--samples 1"),
        (["--quick", "--ship", "9"], "the figures of --quick are no server's"),
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
