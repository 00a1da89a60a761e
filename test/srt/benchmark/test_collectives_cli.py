"""`python -m benchmark.dcp collectives` over gloo, with few and small sizes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from srt.threads import ThreadGroup, run_threads

from benchmark.dcp import (
    collectives,
    collectives_gather,
    collectives_rank,
    collectives_report,
    collectives_values,
    kernels,
    kernels_stage,
    report,
)

ROOT = Path(__file__).parents[3]


def benchmark(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmark.dcp", "collectives", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Figures of two ranks, and what the command said."""
    path = tmp_path_factory.mktemp("collectives") / "figures.csv"
    small = ["--ranks", "2", "--batch", "1", "3", "--samples", "2"]
    ran = benchmark("--device", "cpu", *small, "--csv", path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return path, ran.stdout


def test_measures_both_exchanges_of_gloo(ran: tuple[Path, str]) -> None:
    rows = report.read_csv(ran[0], collectives_report.Row)
    ours = {(r.shape, r.ranks, r.batch, r.name) for r in rows if r.name.startswith(report.OURS)}
    names = ("helix a2a", "helix ag_rs")
    assert ours == {
        (shape, 2, B, n) for shape in kernels_stage.SHAPES for B in (1, 3) for n in names
    }
    for row in rows:
        assert 0 < row.p10_us <= row.median_us <= row.p90_us
        assert row.error <= kernels.BOUND
        assert (row.mode, row.device) == ("eager", "CPU")
        # Half of the heads and their LSEs cross over.
        size = row.batch * row.heads // 2 * (row.head_dim * kernels_stage.DTYPE.itemsize + 4)
        assert row.link_bytes == size


def test_every_line_is_marked(ran: tuple[Path, str]) -> None:
    path, said = ran
    assert {row.mark for row in report.read_csv(path, collectives_report.Row)} == {
        collectives_report.MARK
    }
    lines = [line for line in said.splitlines() if line.startswith(tuple(kernels_stage.SHAPES))]
    assert lines
    assert all(line.endswith(collectives_report.MARK) for line in lines)


def test_says_what_it_leaves_out(ran: tuple[Path, str]) -> None:
    assert ran[1].count("not measured: helix symm (it needs GPUs") == 1
    peers = "not measured: flashinfer, torch all_to_all_nd (they need a GPU for each rank)"
    assert ran[1].count(peers) == 1


class OneThread(collectives_rank.Bench):
    """A rank of a group of threads on the CPU."""

    def __init__(self, rank: int, group: ThreadGroup) -> None:
        self.rank, self.ranks, self.ours, self.said = rank, group.world_size, group, set()
        self.device, self.kept, self.symmetric = torch.device("cpu"), [], False
        self.options: Any = SimpleNamespace(
            shape=["mla", "gqa"], batch=[1, 3], samples=2, eager=False, timeout=60, device="cpu"
        )

    def of_all_ranks(self, value: Any) -> list[Any]:
        return [value]


class Gathering(OneThread, collectives_gather.GatherBench):
    pass


class Projecting(OneThread, collectives_values.ValuesBench):
    sets = 2


def test_values_are_projected_behind_and_before(capsys: pytest.CaptureFixture[str]) -> None:
    def run(rank: int, group: ThreadGroup) -> list[Any]:
        bench = Projecting(rank, group)
        bench.options.shape = ["mla"]
        return bench.run()

    for rows in run_threads(run, 2):
        # Half of the heads and their LSEs cross over; values are a quarter of the latents.
        assert [(row.batch, row.name, row.link_bytes) for row in rows] == [
            (batch, f"helix a2a, projected {order}", batch * 64 * (width * 2 + 4))
            for batch in (1, 3)
            for order, width in (("behind", 512), ("before", 128))
        ]
        assert max(row.error for row in rows) <= kernels.BOUND
    assert capsys.readouterr().out.count("not measured: helix symm (it needs GPUs") == 1


def test_values_are_of_mla(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        collectives.main(["--device", "cpu", "--op", "values", "--shape", "gqa"])
    assert "--shape gqa: --op values is of mla alone" in capsys.readouterr().err


def test_queries_are_gathered_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = run_threads(lambda rank, group: Gathering(rank, group).run(), 2)
    for rows in ranks:
        assert [(row.shape, row.head_dim, row.batch, row.name) for row in rows] == [
            (shape, width, batch, "helix all-gather")
            for shape, width in (("mla", 576), ("gqa", 128))
            for batch in (1, 3)
        ]
        for row in rows:
            assert row.error == 0
            assert row.link_bytes == row.batch * row.heads // 2 * row.head_dim * 2
    assert capsys.readouterr().out.count("not measured: helix symm gather (it needs GPUs") == 1


def test_the_largest_batch_of_what_was_prepared_bounds_it() -> None:
    """A batch above it would be timed by another name."""
    rank, prepared = OneRank(), []
    rank.options = SimpleNamespace(batch=[1, 8], timeout=60)
    symm = SimpleNamespace(
        prepare=lambda **options: prepared.append(options),
        prepare_queries=lambda **options: prepared.append(options),
        largest_prepared=lambda: 8,
    )
    gather = object.__new__(collectives_gather.GatherBench)
    gather.ranks, gather.options = 4, rank.options
    assert rank.prepared("symm", lambda: rank.prepare_symm(symm, 128, 512)) == 8
    assert gather.prepare_queries(symm, 128, (512, 64)) == (128 << 20) // (128 * 576 * 2)
    assert [options["max_tokens"] for options in prepared] == [8, 8]

    def refused() -> int:
        raise RuntimeError("no peer access")

    assert rank.prepared("symm", refused) == 0


def test_reports_on_earlier_figures(ran: tuple[Path, str], tmp_path: Path) -> None:
    plot, again = tmp_path / "figures.png", tmp_path / "again.csv"
    told = benchmark("--from-csv", ran[0], "--csv", again, "--plot", plot)
    assert told.returncode == 0, told.stderr[-3000:]
    assert again.read_text() == ran[0].read_text()
    assert plot.exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_groups_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, groups in ((1, [2]), (2, [2]), (4, [2, 4]), (7, [2, 4]), (8, [2, 4, 8])):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert collectives.groups_that_exist("cuda", ["mla", "gqa"]) == groups
        assert [collectives_report.mark("cuda", N) for N in groups] == [
            "" if gpus >= N else collectives_report.MARK for N in groups
        ]
    assert collectives.groups_that_exist("cpu", ["mla"]) == [2]


class OneRank(collectives_rank.Bench):
    """A rank with a GPU and no process group, whose peer reports as it is told to."""

    def __init__(self, peer_fails: bool = False) -> None:
        self.rank, self.ranks, self.said = 0, 2, set()
        self.device, self.options = torch.device("cuda", 0), SimpleNamespace(eager=False)
        self.peer = "ValueError: the peer's" if peer_fails else None

    def of_all_ranks(self, value: Any) -> list[Any]:
        return [value, self.peer]


class FakeRotation:
    captures = True

    def __init__(
        self, calls: Any, device: Any, *, capture: bool = True, stream: Any = None
    ) -> None:
        self.graph = "graph" if capture else None
        if capture and not self.captures:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        for call in calls:
            call()


class FakeGroup:
    @contextlib.contextmanager
    def graph_capture(self) -> Iterator[Any]:
        yield SimpleNamespace(stream=None)


def broken() -> torch.Tensor:
    raise ValueError("no such kernel")


def candidate(name: str) -> collectives_rank.Candidate:
    return collectives_rank.Candidate(name, FakeGroup(), lambda x, lse: x)


def test_what_runs_is_decided_by_all_ranks_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("benchmark.dcp.measure.Rotation", FakeRotation)
    calls = [lambda: torch.zeros(1)]
    assert OneRank().rotation(candidate("helix a2a"), calls).graph == "graph"
    # The peer cannot: neither does this rank, though it could.
    assert OneRank(peer_fails=True).rotation(candidate("sglang a2a"), calls) is None
    assert "not measured: sglang a2a (ValueError: the peer's)" in capsys.readouterr().out

    monkeypatch.setattr(FakeRotation, "captures", False)
    assert OneRank().rotation(candidate("sglang a2a"), calls).graph is None
    told = capsys.readouterr().out
    assert "not captured in a CUDA graph: sglang a2a (RuntimeError: operation not" in told

    assert OneRank().rotation(candidate("sglang a2a"), [broken]) is None
    with pytest.raises(RuntimeError, match="helix a2a does not run: ValueError: no such kernel"):
        OneRank().rotation(candidate("helix a2a"), [broken])


RANKS, B, OWNED, D = 3, 2, 4, 24


def peer_groups() -> list[Any]:
    group = SimpleNamespace(group_name="dcp")
    return [
        SimpleNamespace(rank_in_group=rank, world_size=RANKS, device_group=group)
        for rank in range(RANKS)
    ]


def ranks_partials() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Each rank's out and lse, and what becomes of all heads, in float64."""
    torch.manual_seed(0)
    outs = [torch.randn(B, RANKS * OWNED, D).to(kernels_stage.DTYPE) for _ in range(RANKS)]
    lses = [3 * torch.randn(B, RANKS * OWNED) for _ in range(RANKS)]
    weights = torch.stack(lses).double().softmax(0)[..., None]
    return outs, lses, (weights * torch.stack(outs).double()).sum(0)


def test_flashinfer_is_given_what_its_kernel_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("flashinfer.comm.dcp_lse_reduce")
    outs, lses, want = ranks_partials()
    asked = []

    def workspace(*arguments: Any) -> torch.Tensor:
        asked.append(arguments[:5])
        return torch.zeros(1)

    def reduce(o: Any, lse: Any, workspace: Any, rank: int, ranks: int, mode: str) -> torch.Tensor:
        """What it documents, of all ranks' inputs: [..., peer, :] is what goes to that peer."""
        assert (o.shape, lse.shape) == ((B, OWNED, ranks, D), (B, OWNED, ranks))
        assert (o.is_contiguous(), lse.is_contiguous(), mode) == (True, True, "basee")
        sent = [collectives_rank.by_owner(*pair, ranks) for pair in zip(outs, lses, strict=True)]
        assert torch.equal(o, sent[rank][0])
        weights = torch.stack([lse[..., rank] for _, lse in sent]).softmax(0)[..., None]
        return (weights * torch.stack([o[..., rank, :] for o, _ in sent]).float()).sum(0)

    monkeypatch.setattr(fused, "decode_cp_a2a_lse_reduce_create_workspace", workspace)
    monkeypatch.setattr(fused, "decode_cp_a2a_lse_reduce", reduce)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    for rank, group in enumerate(peer_groups()):
        found = collectives_rank.flashinfer_candidates(group, torch.device("cpu"), 8, OWNED, D)
        assert [c.name for c in found] == ["flashinfer kernel", "flashinfer"]
        for candidate in found:
            inputs = outs[rank], lses[rank]
            got = candidate.run(*(candidate.lay(*inputs) if candidate.lay else inputs))
            own = want[:, rank * OWNED : (rank + 1) * OWNED]
            assert kernels.relative_error(got, own) < 1e-6
    assert asked == [(8, OWNED, RANKS, D, kernels_stage.DTYPE)] * RANKS  # one for a stream


def test_torch_is_given_rows_that_lie_by_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed._symmetric_memory as symm_mem

    outs, lses, want = ranks_partials()
    sent: dict[int, torch.Tensor] = {}
    here = 0

    def all_to_all(
        input: torch.Tensor, out: torch.Tensor, scatter: int, gather: int, *, group: str
    ) -> None:
        """What it documents: row block r of every peer, peer j's in out[:, j]."""
        assert (scatter, gather, group) == (0, 1, "dcp")
        sent[here] = input.clone()
        if len(sent) == RANKS:
            for peer in range(RANKS):
                out[:, peer] = sent[peer][here]

    monkeypatch.setattr(symm_mem, "set_backend", lambda name: None)
    monkeypatch.setattr(symm_mem, "empty", torch.empty)
    monkeypatch.setattr(symm_mem, "rendezvous", lambda buffer, group: None)
    monkeypatch.setattr(symm_mem, "all_to_all_nd", all_to_all)
    device = torch.device("cpu")
    candidates = [
        collectives_rank.torch_candidates(g, device, 8, OWNED, D)[0] for g in peer_groups()
    ]
    for turn in range(2):  # all have sent by the second
        for here, candidate in enumerate(candidates):
            got = candidate.run(outs[here], lses[here])
            if turn:
                own = want[:, here * OWNED : (here + 1) * OWNED]
                assert kernels.relative_error(got, own) < kernels.BOUND


def test_peers_that_fail_leave_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(ranks: int, options: Any, *, symmetric: bool) -> list[Any]:
        assert symmetric
        raise RuntimeError("Traceback\nValueError: no NCCL windows")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(collectives, "run_ranks", fails)
    options: Any = SimpleNamespace(device="cuda")
    assert collectives.symmetric_rows(2, options) == []
    assert "(RuntimeError: ValueError: no NCCL windows)" in capsys.readouterr().out
    assert collectives.symmetric_rows(4, options) == []
    assert "they need a GPU for each rank" in capsys.readouterr().out


def test_a_failed_build_says_why() -> None:
    error = RuntimeError(
        "Ninja build failed. Ninja output:\n[1/3] nvcc\na.cu:5: fatal error: no b.h\n"
    )
    said = collectives_rank.failure_of(error)
    assert said == "RuntimeError: Ninja build failed. Ninja output:; a.cu:5: fatal error: no b.h"


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--ranks", "3"], "--ranks 3 cannot share the 128 heads of mla"),
        (["--ranks", "1"], "--ranks 1 cannot"),
        (["--samples", "1"], "--samples 1"),
        (["--batch", "0"], "--batch 0"),
    ],
)
def test_refuses_what_it_cannot_measure(args: list[str], names: str) -> None:
    told = benchmark("--device", "cpu", *args)
    assert told.returncode == 2
    assert names in told.stderr
