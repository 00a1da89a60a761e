"""The real server over HTTP, and every layout in schedulers, against ``transformers``.

All layouts serve the same load, one request at a time and in batches, with both exchanges: on a
server each family and each layout once, the rest through SGLang's schedulers without one; one
by fa3 on stand-ins for its kernels. So are recurrent states, and windows with sinks. The oracle
shares no code with SGLang. Each rank checks at idle that no slot of its pool is lost (see
`managers/invariant_checker.py`); a rank that finds one lost ends, and the test with it.
"""

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sglang_cpu_reference.checkpoints import Family, make_checkpoint
from sglang_cpu_reference.server import Server
from srt.expected import check, check_all, prompt
from srt.fresh import Fresh
from srt.models import serving
from srt.models.test_windows import OTHERS
from srt.underway import prompts_are_taken

FAMILIES = ("llama", "qwen3", "deepseek_v2")
LAYOUTS = ((1, 1), (2, 2), (4, 2), (4, 4))
BACKENDS = ("ag_rs", "a2a")
# Family, ranks, K and exchange, "" where there is none; an attention backend on stand-ins for its
# kernels, "" for the reference.
ON_SERVERS = (
    ("llama", 1, 1, "", ""),
    ("qwen3", 2, 2, "ag_rs", ""),
    ("llama", 4, 2, "ag_rs", "fa3"),
    ("deepseek_v2", 4, 4, "a2a", ""),
)
# With the exchanges that are left, "" where there is none.
IN_SCHEDULERS = [
    (family, tp, dcp, left)
    for family in FAMILIES
    for tp, dcp in LAYOUTS
    for names in (BACKENDS if dcp > 1 else ("",),)
    if (left := tuple(name for name in names if (family, tp, dcp, name, "") not in ON_SERVERS))
]
# Some layouts run with pages of 1, so that a widened page is as short as it can be.
PAGE_SIZES = {(2, 2): 64, (4, 2): 1, (4, 4): 16, (1, 1): 1}
# Odd multiples of the page, so that chunks end between pages of the group; a chunk holds at least
# one of those.
CHUNKS = {(2, 2): 192, (4, 2): 77, (4, 4): 80, (1, 1): 77}
NEW_TOKENS = 6
# Rows of each rank's pool.
ROWS = 4096


def lengths(page: int, ranks: int, chunk: int) -> list[int]:
    """One token, fewer than K, around a page and around a page of the whole group."""
    edges = {page * ranks + d for d in (-1, 0, 1)} | {63, 64, 65}
    return sorted({1, max(1, ranks - 1), *edges, 2 * chunk + 3} - {0})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(family, root / family) for family in FAMILIES}


def serve(checkpoint: Path, tp: int, dcp: int, backend: str, *flags: str, **options: Any) -> Server:
    """A server of a layout. options: those of `Server`."""
    layout = ["--tp", str(tp)]
    if dcp > 1:
        layout += ["--dcp-size", str(dcp), "--dcp-comm-backend", backend]
    return Server(checkpoint, *layout, *flags, **options)


def on_stand_ins(attention: str, **platform: bool) -> str:
    """What a launcher runs first to serve by a backend on stand-ins for its kernels.

    platform: facts of the machine that SGLang is told, on every rank, see `override_platform`.
    """
    return (
        f"from sglang_cpu_reference import stand_ins; stand_ins.install(['{attention}'])\n"
        "from sglang.srt.runtime_context import override_platform\n"
        f"override_platform(**{platform}).install()"
    )


def abort_midway(server: Server, tokens: list[int]) -> None:
    """Start a long request and abort it after its first tokens."""
    outcome: list[object] = []
    body = {
        "input_ids": tokens,
        "rid": "to-be-aborted",
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True, "temperature": 0},
    }
    request = threading.Thread(target=lambda: outcome.append(server.post("/generate", body)))
    with prompts_are_taken(server):
        request.start()
    server.post("/abort_request", {"rid": "to-be-aborted"})
    request.join(120)
    assert not request.is_alive()
    assert outcome, "the aborted request was not answered"
    assert outcome[0]["meta_info"]["finish_reason"]["type"] == "abort"  # type: ignore[index]


def row_bytes(checkpoint: Path, head_shards: int) -> int:
    """Bytes of one row of the pool over all layers, fp32: the latent, or K and V of the heads."""
    config = json.loads((checkpoint / "config.json").read_text())
    if latent := config.get("kv_lora_rank"):
        width = latent + config["qk_rope_head_dim"]
    else:
        width = 2 * max(1, config["num_key_value_heads"] // head_shards) * config["head_dim"]
    return config["num_hidden_layers"] * width * 4


def sizes(tp: int, dcp: int) -> tuple[str, ...]:
    return (
        *("--page-size", str(PAGE_SIZES[tp, dcp]), "--max-total-tokens", str(ROWS)),
        *("--chunked-prefill-size", str(CHUNKS[tp, dcp])),
    )


def check_pool(checkpoint: Path, tp: int, dcp: int, kv_tokens: int, kv_bytes: int) -> None:
    """As many rows as without sharding, and K times the tokens in them."""
    assert kv_tokens == ROWS * dcp
    assert kv_bytes == (ROWS + PAGE_SIZES[tp, dcp]) * row_bytes(checkpoint, tp // dcp)


class Prompts(NamedTuple):
    """The load of a layout, in its order."""

    alone: list[list[int]]
    # The longest of them again, continued differently.
    continued: list[list[int]]
    # At once, of mixed length, new to the cache.
    batch: list[list[int]]

    def check_cached(self, cached: list[int], unit: int) -> None:
        """Prompt tokens that the cache had, of those alone and continued: whole widened pages."""
        assert not any(cached[: len(self.alone)])
        for tokens in cached[len(self.alone) :]:
            assert 0 < tokens <= len(self.alone[-1])
            assert tokens % unit == 0


def prompts_of(tp: int, dcp: int) -> Prompts:
    alone = [prompt(length) for length in lengths(PAGE_SIZES[tp, dcp], dcp, CHUNKS[tp, dcp])]
    return Prompts(
        alone,
        [alone[-1] + tail for tail in (prompt(5, seed=1), prompt(9, seed=2))],
        [prompt(length, seed=3) for length in (1, 2, 3, 31, 64, 65, 130, 200)],
    )


@pytest.mark.server
@pytest.mark.parametrize(("family", "tp", "dcp", "backend", "attention"), ON_SERVERS)
def test_layout(
    checkpoints: dict[str, Path], family: str, tp: int, dcp: int, backend: str, attention: str
) -> None:
    checkpoint, prompts = checkpoints[family], prompts_of(tp, dcp)
    flags, first = sizes(tp, dcp), ""
    if attention:
        flags, first = (*flags, "--attention-backend", attention), on_stand_ins(attention)
    with serve(checkpoint, tp, dcp, backend, *flags, prelude=first) as server:
        info = server.server_info()
        assert dcp == 1 or info["dcp_comm_backend"] == backend
        assert info["attention_backend"] == (attention or "torch_native")
        pool = info["sglang_helix"]
        check_pool(checkpoint, tp, dcp, pool["kv_tokens"], pool["kv_bytes"])
        cached = []
        for tokens in prompts.alone + prompts.continued:
            answer = server.generate(tokens, NEW_TOKENS)
            check(checkpoint, tokens, answer, NEW_TOKENS)
            cached.append(answer.cached_tokens)
        prompts.check_cached(cached, PAGE_SIZES[tp, dcp] * dcp)

        server.flush_cache()
        answers = server.generate_batch(prompts.batch, NEW_TOKENS)
        for tokens, answer in zip(prompts.batch, answers, strict=True):
            check(checkpoint, tokens, answer, NEW_TOKENS)

        abort_midway(server, prompt(20, seed=4))
        again = prompt(33, seed=5)
        check(checkpoint, again, server.generate(again, NEW_TOKENS), NEW_TOKENS)
        everything_is_free(server)


class Loaded(NamedTuple):
    """A rank's answers to the load, the end of a request that was aborted, and an answer after."""

    report: serving.Report
    aborted: dict[str, str]
    again: serving.Answer


def load(rank: int, argv: list[str], prompts: Prompts, exchanges: tuple[str, ...]) -> list[Loaded]:
    """In a rank: the load of a layout by each exchange, "" for plain TP."""
    scheduler = serving.scheduler_of(rank, argv)
    alone = [[tokens] for tokens in prompts.alone + prompts.continued]
    loaded = []
    for _ in serving.each_exchange(scheduler, exchanges) if any(exchanges) else exchanges:
        report = serving.answer_all(scheduler, [*alone, prompts.batch], NEW_TOKENS)
        aborted = serving.abort_midway(scheduler, prompt(20, seed=4), turns=5)
        (again,) = serving.answer(scheduler, [prompt(33, seed=5)], NEW_TOKENS)
        scheduler.flush_cache()
        scheduler.on_idle()  # with nothing cached
        loaded.append(Loaded(report, aborted.finish, again))
    return loaded


@pytest.mark.parametrize(("family", "tp", "dcp", "exchanges"), IN_SCHEDULERS)
def test_layout_in_schedulers(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    family: str,
    tp: int,
    dcp: int,
    exchanges: tuple[str, ...],
) -> None:
    checkpoint, prompts = checkpoints[family], prompts_of(tp, dcp)
    layout = ("--dcp-size", str(dcp), "--dcp-comm-backend", exchanges[0]) if dcp > 1 else ()
    processes = request.getfixturevalue("ready" if dcp > 1 else "fresh")
    argv = serving.command_line(checkpoint, tp, *layout, *sizes(tp, dcp))
    asked = [*prompts.alone, *prompts.continued, *prompts.batch]
    by_rank = processes.ranks(load, tp, argv, prompts, exchanges)
    assert all(len(loaded) == len(exchanges) for loaded in by_rank)
    for report, aborted, again in itertools.chain.from_iterable(by_rank):
        check_pool(checkpoint, tp, dcp, report.kv_tokens, report.kv_bytes)
        answers = itertools.chain.from_iterable(report.answers)
        for tokens, answer in zip(asked, answers, strict=True):
            check(checkpoint, tokens, answer, NEW_TOKENS)
        cached = [answer.cached_tokens for (answer,) in report.answers[:-1]]
        prompts.check_cached(cached, PAGE_SIZES[tp, dcp] * dcp)
        assert aborted["type"] == "abort"
        check(checkpoint, prompt(33, seed=5), again, NEW_TOKENS)


# Recurrent states; windows in a pool of their own, with sinks. Ranks, and the tokens of 133 that a
# longer prompt has from the cache.
OTHER_CACHES: dict[str, tuple[str | Family, int, int]] = {
    "qwen3_next": ("qwen3_next", 2, 128),
    "granite_swa": (OTHERS["granite_swa"], 4, 132),
}


@pytest.mark.server
@pytest.mark.parametrize("name", OTHER_CACHES)
def test_states_windows_and_sinks(tmp_path: Path, name: str) -> None:
    """Beside a sharded cache, on a server."""
    family, tp, cached = OTHER_CACHES[name]
    heads = {"num_key_value_heads": tp // 2}
    checkpoint = make_checkpoint(family, tmp_path, **heads)
    flags = ("--page-size", "2", "--chunked-prefill-size", "100", "--max-total-tokens", "512")
    with serve(checkpoint, tp, 2, "a2a", *flags) as server:
        first = prompt(133, seed=20)
        for tokens, had in ((first, 0), (first + prompt(6, seed=24), cached)):
            answer = server.generate(tokens, NEW_TOKENS)
            check(checkpoint, tokens, answer, NEW_TOKENS)
            assert answer.cached_tokens == had
        batch = [prompt(length, seed=3) for length in (1, 19)]
        for tokens, answer in zip(batch, server.generate_batch(batch, NEW_TOKENS), strict=True):
            check(checkpoint, tokens, answer, NEW_TOKENS)
        everything_is_free(server)


def everything_is_free(server: Server) -> None:
    """Let every rank run its idle check, then flush and let it run again with nothing cached."""
    time.sleep(0.5)
    server.flush_cache()
    time.sleep(0.5)
    assert server.get("/health") is not None
    assert "memory leak" not in server.log()


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_small_pool_retracts_and_resumes(
    ready: Fresh, checkpoints: dict[str, Path], family: str
) -> None:
    """Eight requests that cannot all be held: some are retracted, and still answer the same."""
    checkpoint, new_tokens = checkpoints[family], 48
    batch = [prompt(20, seed=seed) for seed in range(10, 18)]
    layout = ("--dcp-size", "2", "--dcp-comm-backend", "a2a", "--page-size", "1")
    flags = (*layout, "--max-total-tokens", "128", "--schedule-conservativeness", "0.05")
    argv = serving.command_line(checkpoint, 2, *flags)
    for answers in ready.ranks(serving.oversubscribed, 2, argv, batch, new_tokens):
        assert sum(answer.retractions for answer in answers) > 0
        for tokens, answer in zip(batch, answers, strict=True):
            check(checkpoint, tokens, answer, new_tokens)


@pytest.mark.parametrize(
    ("family", "backend", "overrides"),
    [
        ("llama", "a2a", {}),
        ("deepseek_v2", "ag_rs", {}),
        # A layer with a window of 16 tokens, and one without: prompts end beyond it.
        (
            "gpt_oss",
            "a2a",
            {"num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"]},
        ),
    ],
)
def test_triton_backend_under_the_interpreter(
    interpreted: Fresh, tmp_path: Path, family: str, backend: str, overrides: dict[str, Any]
) -> None:
    """The Triton adapter and the series' own kernels, a few tokens; slow."""
    checkpoint = make_checkpoint(family, tmp_path / family, num_hidden_layers=2, **overrides)
    flags = (
        *("--dcp-size", "2", "--dcp-comm-backend", backend, "--max-running-requests", "4"),
        *("--attention-backend", "triton", "--moe-runner-backend", "triton"),
        *("--chunked-prefill-size", "16"),
    )
    batch = [prompt(length, seed=6) for length in (1, 19)]
    batches = [batch, batch[1:]]
    for report in serving.serve(interpreted, checkpoint, 2, flags, batches, 3):
        check_all(checkpoint, batches, report.answers, 3)
