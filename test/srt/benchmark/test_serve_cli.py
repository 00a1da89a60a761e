"""`python -m benchmark.dcp serve` on the CPU platform: a tiny model, contexts of some dozens."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe import topk
from sglang.srt.model_loader import loader
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.drafts import make_eagle
from sglang_cpu_reference.server import Server, ServerError
from sglang_helix.srt.layers.dcp.exchange import GATHER_VARIABLE
from srt.fresh import Fresh
from srt.models import serving

from benchmark.dcp import held, layouts, load, made, report, serve
from benchmark.dcp.layouts import Row, parse_layout
from benchmark.dcp.load import Answer, Load

ROOT = Path(__file__).parents[3]
NEW_TOKENS = 8
# What the pool of plain TP holds for two requests, what only the sharded one does, and neither.
FITS, FITS_SHARDED, FITS_NOWHERE = 48, 160, 600
DRAFTS = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
)


def benchmark(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmark.dcp", "serve", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
    )


def check_figures(row: Row) -> None:
    assert 0 < row.tpot_p10_ms <= row.tpot_median_ms <= row.tpot_p90_ms <= row.longest_gap_ms
    assert row.ttft_median_ms > 0
    assert row.output_tokens == row.concurrency * NEW_TOKENS
    # No request waits for its first token longer than the whole run takes, nor is it as fast as
    # all its gaps at the lowest.
    seconds = row.output_tokens / row.tokens_per_s
    assert 1e3 * seconds > max(row.ttft_median_ms, (NEW_TOKENS - 1) * row.tpot_p10_ms)
    assert 0 <= row.cached_tokens < row.context


@pytest.mark.server
@pytest.mark.timeout(420)
def test_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "figures.csv", tmp_path / "figures.png"
    flags = ("--layouts", "tp", "a2a", "--intervals", "2", "--prefix", "made", "--together")
    assert serve.main(["--cpu", *flags, "--csv", str(path)]) == 0
    ran = capsys.readouterr().out
    rows = report.read_csv(path, Row)
    contexts = (FITS, FITS_SHARDED, FITS_NOWHERE)
    assert [(row.layout, row.context) for row in rows] == [
        (layout, context) for layout in ("tp", "a2a") for context in contexts
    ]
    measured = {(row.layout, row.context) for row in rows if row.status == layouts.MEASURED}
    assert measured == {("tp", FITS), ("a2a", FITS), ("a2a", FITS_SHARDED)}
    for row in rows:
        assert (row.concurrency, row.prefix, row.device) == (2, "made", "CPU")
        assert row.prefill_decode_interval == 2  # as the server itself says
        if row.status == layouts.MEASURED:
            check_figures(row)
            # What fills units of the cache was found there.
            assert row.cached_tokens == (row.context - 1) // (8 * row.dcp_size) * (8 * row.dcp_size)
        else:
            assert row.status == layouts.DOES_NOT_FIT
            assert row.tpot_median_ms is None
            assert row.tokens_per_s is None
            assert row.needed_tokens > row.kv_tokens
    # The same bytes on each rank, and twice the tokens.
    tp, a2a = rows[0], rows[-1]
    assert (tp.kv_tokens, a2a.kv_tokens) == (256, 512)
    assert a2a.kv_bytes == pytest.approx(tp.kv_bytes, rel=0.1)

    again = benchmark("--from-csv", path, "--csv", tmp_path / "again.csv", "--plot", plot)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "again.csv").read_text() == path.read_text()
    assert plot.exists() or "matplotlib is not installed" in again.stdout
    for said in (ran, again.stdout):
        lines = [line for line in said.splitlines() if line.split()[:1] in LINE_STARTS]
        assert len(lines) == len(rows) + len(contexts) + 2  # figures, time per token, capacity
        assert all(line.endswith(layouts.MARK) for line in lines)
        assert said.count(layouts.DOES_NOT_FIT) == 6
    assert "put into the prefix cache without being computed" in ran


LINE_STARTS = [[word] for word in ("tp", "a2a", str(FITS), str(FITS_SHARDED), str(FITS_NOWHERE))]


@pytest.mark.server
@pytest.mark.timeout(420)
def test_a_running_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That drafts: what came of it is printed beside its times."""
    model, draft = make_eagle(tmp_path)
    flags = ["--tp", "2", "--dcp-size", "2", "--dcp-comm-backend", "a2a"]
    flags += [*DRAFTS, "--speculative-draft-model-path", str(draft)]
    rows = {}
    with Server(model, *flags, "--max-total-tokens", "256", "--page-size", "8") as server:
        for prefix in ("shared", "cold"):
            path = tmp_path / f"{prefix}.csv"
            flags = [
                *("--url", f"http://127.0.0.1:{server.port}", "--prefix", prefix),
                *("--contexts", FITS_NOWHERE, FITS, "--concurrency", 1, 3),
                *("--new-tokens", NEW_TOKENS, "--csv", path),
            ]
            assert serve.main(list(map(str, flags))) == 0
            rows[prefix] = report.read_csv(path, Row)
    said = re.findall(r"(\d+) requests: ([\d.]+) tokens a verify pass", capsys.readouterr().out)
    assert [requests for requests, _ in said] == 2 * ["1", "3"]
    assert all(1 < float(tokens) <= 4 for _, tokens in said)
    for prefix, found in rows.items():
        assert [(row.context, row.concurrency) for row in found] == [
            (FITS, 1), (FITS, 3), (FITS_NOWHERE, 1), (FITS_NOWHERE, 3),
        ]  # fmt: skip
        for row in found:
            assert (row.layout, row.comm, row.dcp_size, row.tp_size) == ("a2a:2", "a2a", 2, 2)
            assert (row.mark, row.prefix) == (layouts.MARK, prefix)
        for row in found[:2]:
            check_figures(row)
            # One prefill served all requests, but for what does not fill a unit of the cache.
            assert row.cached_tokens == (0 if prefix == "cold" else (FITS - 1) // 16 * 16)
        assert {row.status for row in found[2:]} == {layouts.DOES_NOT_FIT}


def over_made_contexts(
    rank: int, argv: list[str], batches: list[list[list[int]]]
) -> serving.Report:
    """In a rank's process: answers to prompts whose contexts nobody computed."""
    scheduler = serving.scheduler_of(rank, argv)
    add = scheduler._add_request_to_queue

    def made_first(request: Any, *args: Any, **kwargs: Any) -> None:
        made.make_context(scheduler, request)
        add(request, *args, **kwargs)

    scheduler._add_request_to_queue = made_first
    return serving.answer_all(scheduler, batches, NEW_TOKENS)


@pytest.mark.parametrize("page", [1, 4])
def test_contexts_are_made_beside_a_draft_model(ready: Fresh, tmp_path: Path, page: int) -> None:
    """Whose keys in the prefix cache are pairs of tokens; no slot is lost."""
    model, draft = make_eagle(tmp_path)
    flags = (*DRAFTS, "--speculative-draft-model-path", str(draft), "--page-size", str(page))
    argv = serving.command_line(model, 2, "--dcp-size", "2", "--dcp-comm-backend", "a2a", *flags)
    tokens = [i % 256 for i in range(60)]
    for answered in ready.ranks(over_made_contexts, 2, argv, [[tokens], [[*tokens, 7, 8]]]):
        for answers, length in zip(answered.answers, (60, 62), strict=True):
            # All but the last pair, in whole pages of the group.
            assert answers[0].cached_tokens == (length - 2) // (2 * page) * 2 * page


def test_contexts_are_made_for_a_hybrid_model(ready: Fresh, tmp_path: Path) -> None:
    """Each with a recurrent state, also where one is the beginning of another; none is lost."""
    model = make_checkpoint("qwen3_next", tmp_path, num_key_value_heads=1)
    argv = serving.command_line(model, 2, "--dcp-size", "2", "--dcp-comm-backend", "a2a")
    tokens = [i % 256 for i in range(140)]
    batches = [[tokens[:70]], [tokens, tokens[:70]], [tokens]]
    for answered in ready.ranks(over_made_contexts, 2, argv, batches):
        cached = [[answer.cached_tokens for answer in answers] for answers in answered.answers]
        assert cached == [[68], [138, 68], [138]]  # whole pages of two ranks


def test_random_weights_choose_experts_evenly() -> None:
    """By SGLang's routing of a layer of DeepSeek-V3-8-layers: 8 of 32 experts, of 4 of 8 groups.

    Of 8 tokens that choose at random, 28.8 experts are expected; with SGLang's random bias they
    choose the same ones, which the loader's own name must be patched to mend.
    """
    hidden, routed = 7168, 32
    gate = torch.nn.Module()
    gate.weight = torch.nn.Parameter(torch.empty(routed, hidden, dtype=torch.bfloat16))
    gate.e_score_correction_bias = torch.nn.Parameter(torch.empty(routed))
    norm = torch.nn.RMSNorm(hidden, dtype=torch.bfloat16)
    model = torch.nn.ModuleDict({"norm": norm, "gate": gate})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(8, hidden, generator=generator).bfloat16()

    def chosen() -> int:
        route = inspect.unwrap(topk.biased_grouped_topk_impl)
        scores = norm(tokens) @ gate.weight.T
        bias = gate.e_score_correction_bias
        return len(route(tokens, scores.float(), bias, 8, True, 8, 4)[1].unique())

    with torch.no_grad():
        loader.initialize_dummy_weights(model)
        assert chosen() < 12
        made.even_out_experts(None, model)
        assert chosen() > 24


@pytest.mark.parametrize(
    ("info", "variable", "queries"),
    [
        ({"dcp_size": 1}, None, ""),
        ({"dcp_size": 2, "dcp_replicate_q_proj": True}, None, "replicated"),
        ({"dcp_size": 2, "dcp_comm_backend": "symm"}, None, "kernel"),
        ({"dcp_size": 2, "dcp_comm_backend": "symm"}, "0", "all-gather"),
        ({"dcp_size": 2, "dcp_comm_backend": "a2a"}, None, "all-gather"),
    ],
)
def test_figures_say_where_queries_come_from(
    info: dict[str, Any], variable: str | None, queries: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(GATHER_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(GATHER_VARIABLE, variable)
    assert serve.queries_of(info, ours=True) == queries
    # A server that runs elsewhere has an environment of its own.
    gathered = info["dcp_size"] > 1 and "dcp_replicate_q_proj" not in info
    assert serve.queries_of(info, ours=False) == ("gathered" if gathered else queries)


def test_gaps_between_tokens() -> None:
    answer = Answer(1.0, [(2.0, 1), (2.5, 2), (3.5, 4)], 0)
    assert answer.gaps == [0.5, 0.5, 0.5]
    waits = Answer(1.0, [(4.0, 1), (5.0, 2)], 0)
    assert not load.ran_together([answer, waits])
    assert load.ran_together([answer, Answer(1.0, [(3.0, 1), (5.0, 2)], 0)])


def test_what_drafts_bring_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """9 and 11 tokens, of which the prompts' passes brought one each, in 4 and 5 others."""
    answers = [
        Answer(1.0, [(2.0, 1), (3.0, 9)], 0, passes=4),
        Answer(1.0, [(2.0, 1), (3.0, 11)], 0, passes=5),
    ]
    client = SimpleNamespace(complete_together=lambda *_: answers, flush_cache=lambda: None)
    load.measure(client, Load(20, 2, 9, "cold"))  # type: ignore[arg-type]
    assert "20, 2 requests: 2.00 tokens a verify pass" in capsys.readouterr().out
    answers = [answer._replace(passes=0) for answer in answers]
    load.measure(client, Load(20, 2, 9, "cold"))  # type: ignore[arg-type]
    assert "verify pass" not in capsys.readouterr().out


@pytest.mark.parametrize("prefix", layouts.PREFIXES)
def test_prompts(prefix: str) -> None:
    shorter, longer = (Load(n, 3, NEW_TOKENS, prefix).prompts() for n in (20, 50))
    assert [len(prompt) for prompt in shorter] == [20] * 3
    assert all(long[:19] == short[:19] for short, long in zip(shorter, longer, strict=True))
    assert len({tuple(prompt) for prompt in longer}) == 3
    assert len({tuple(prompt[:-1]) for prompt in longer}) == (1 if prefix == "shared" else 3)


def test_capacity_is_counted_for_contexts_of_their_own() -> None:
    # 20 + 8 tokens are two units of 16, and one stays free: 3 requests of 48 tokens.
    for prefix in layouts.PREFIXES:
        assert Load(20, 3, NEW_TOKENS, prefix).needed_tokens(16) == 144


def test_layouts_by_name() -> None:
    assert parse_layout("tp", 8).flags == ()
    assert parse_layout("ag_rs", 8).flags == ("--dcp-size", "8", "--dcp-comm-backend", "ag_rs")
    assert parse_layout("symm:4", 8).flags == ("--dcp-size", "4", "--dcp-comm-backend", "symm")
    assert parse_layout("attn-tp:2", 8).flags == (
        *("--attn-tp-size", "2"), *("--dcp-comm-backend", "a2a"),
    )  # fmt: skip
    assert parse_layout("attn-tp:2:symm", 8).flags[2:] == ("--dcp-comm-backend", "symm")
    assert parse_layout("tp@fa3", 8).flags == ("--attention-backend", "fa3")
    assert parse_layout("a2a:4@fa3", 8).flags[2:] == (
        *("--dcp-comm-backend", "a2a"), *("--attention-backend", "fa3"),
    )  # fmt: skip
    info = {"tp_size": 8, "dcp_size": 4, "dcp_comm_backend": "symm", "dcp_replicate_q_proj": None}
    assert serve.name_of(info) == "symm:4"
    assert serve.name_of({**info, "dcp_replicate_q_proj": True}) == "attn-tp:2:symm"
    assert serve.name_of({**info, "dcp_size": 1}) == "tp"


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--cpu", "--layouts", "attn-tp"], "--layouts attn-tp: use tp, ag_rs[:K]"),
        (["--cpu", "--layouts", "a2a:x"], "--layouts a2a:x: 'x' is not a number"),
        (["--cpu", "--layouts", "a2a:2:symm"], "--layouts a2a:2:symm: use tp"),
        (["--cpu", "--layouts", "attn-tp:2:nccl"], "--layouts attn-tp:2:nccl: use tp"),
        (["--cpu", "--prefix", "made", "--launcher", "mine"], "leave out --url and --launcher"),
        (["--cpu", "--together", "--launcher", "mine"], "leave out --url and --launcher"),
        (["--cpu", "--contexts", "1"], "--contexts 1: at least 2"),
        (["--cpu", "--new-tokens", "2"], "--new-tokens 2: at least 3"),
        (["--url", "http://127.0.0.1:1", "--tp", "2"], "--url drives a server as it is"),
    ],
)
def test_refuses_what_it_cannot_measure(
    args: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        serve.main(args)
    assert stopped.value.code == 2
    assert names in capsys.readouterr().err


class Clock:
    """Stands for `time`: a second for every sleep, and at second 100 a server's turn comes."""

    def __init__(self, turn: Path) -> None:
        self.now, self.turn = 0, turn

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _seconds: float) -> None:
        self.now += 1
        if self.now == 100:
            self.turn.touch()


@pytest.mark.parametrize(("healthy_at", "starts"), [(109, True), (112, False)])
def test_the_time_to_start_counts_from_the_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, healthy_at: int, starts: bool
) -> None:
    """However long servers before it took."""
    clock = Clock(tmp_path / "turn")
    monkeypatch.setattr("sglang_cpu_reference.server.time", clock)
    monkeypatch.setattr(Server, "_launch", lambda *_: None)
    monkeypatch.setattr(Server, "_healthy", lambda _: clock.now >= healthy_at)
    monkeypatch.setattr(Server, "log", lambda *_: "")
    options = SimpleNamespace(
        model="model", tp=2, cpu=False, prefix="made", server_flags=(), start_timeout=10.0,
        launcher=held.__name__,
    )  # fmt: skip
    expected = nullcontext() if starts else pytest.raises(ServerError, match="after 10 s")
    with expected, serve.started(parse_layout("tp", 2), 0, options, clock.turn):  # type: ignore[arg-type]
        assert clock.now == healthy_at


def test_a_server_that_does_not_start() -> None:
    reason = "the server exited\nINFO: hello\nValueError: --dcp-size 3 does not divide\n\n"
    assert serve.reason_of(RuntimeError(reason)) == "ValueError: --dcp-size 3 does not divide"
