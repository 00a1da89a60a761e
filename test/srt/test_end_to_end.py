"""The real server over HTTP against ``transformers``, on the same fp32 checkpoint.

Every layout serves the same load, one request at a time and in batches: with one exchange through a
server, with the other through SGLang's schedulers without one. The oracle shares no code with
SGLang. Each rank checks at idle that no slot of its pool is lost (see
`managers/invariant_checker.py`); a rank that finds one lost ends the server, and the test with it.
"""

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Server
from srt.expected import check, prompt
from srt.fresh import Fresh
from srt.models import serving

FAMILIES = ("llama", "qwen3", "deepseek_v2")
LAYOUTS = ((1, 1), (2, 2), (4, 2), (4, 4))
BACKENDS = ("ag_rs", "a2a")
CASES = [
    (family, tp, dcp, BACKENDS[(number + turn) % 2], BACKENDS[(number + turn + 1) % 2])
    for number, family in enumerate(FAMILIES)
    for turn, (tp, dcp) in enumerate(LAYOUTS)
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


def serve(
    checkpoint: Path, tp: int, dcp: int, backend: str, *flags: str, **environment: str
) -> Server:
    layout = ["--tp", str(tp)]
    if dcp > 1:
        layout += ["--dcp-size", str(dcp), "--dcp-comm-backend", backend]
    return Server(checkpoint, *layout, *flags, env=environment)


def abort_midway(server: Server, tokens: list[int]) -> None:
    """Start a long request and abort it after its first tokens."""
    outcome: list[object] = []
    body = {
        "input_ids": tokens,
        "rid": "to-be-aborted",
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True, "temperature": 0},
    }
    request = threading.Thread(target=lambda: outcome.append(server.post("/generate", body)))
    request.start()
    time.sleep(1.0)
    server.post("/abort_request", {"rid": "to-be-aborted"})
    request.join(60)
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
@pytest.mark.parametrize(("family", "tp", "dcp", "backend"), [case[:4] for case in CASES])
def test_layout(checkpoints: dict[str, Path], family: str, tp: int, dcp: int, backend: str) -> None:
    checkpoint, prompts = checkpoints[family], prompts_of(tp, dcp)
    with serve(checkpoint, tp, dcp, backend, *sizes(tp, dcp)) as server:
        info = server.server_info()
        assert dcp == 1 or info["dcp_comm_backend"] == backend
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


@pytest.mark.parametrize(
    ("family", "tp", "dcp", "backend"), [(*case[:3], case[4]) for case in CASES if case[2] > 1]
)
def test_layout_in_schedulers(
    ready: Fresh, checkpoints: dict[str, Path], family: str, tp: int, dcp: int, backend: str
) -> None:
    checkpoint, prompts = checkpoints[family], prompts_of(tp, dcp)
    layout = ("--dcp-size", str(dcp), "--dcp-comm-backend", backend, *sizes(tp, dcp))
    batches = [*([tokens] for tokens in prompts.alone + prompts.continued), prompts.batch]
    for report in serving.serve(ready, checkpoint, tp, layout, batches, NEW_TOKENS):
        check_pool(checkpoint, tp, dcp, report.kv_tokens, report.kv_bytes)
        asked, answers = map(itertools.chain.from_iterable, (batches, report.answers))
        for tokens, answer in zip(asked, answers, strict=True):
            check(checkpoint, tokens, answer, NEW_TOKENS)
        cached = [answer.cached_tokens for (answer,) in report.answers[:-1]]
        prompts.check_cached(cached, PAGE_SIZES[tp, dcp] * dcp)


def everything_is_free(server: Server) -> None:
    """Let every rank run its idle check, then flush and let it run again with nothing cached."""
    time.sleep(0.5)
    server.flush_cache()
    time.sleep(0.5)
    assert server.get("/health") is not None
    assert "memory leak" not in server.log()


@pytest.mark.server
@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_small_pool_retracts_and_resumes(checkpoints: dict[str, Path], family: str) -> None:
    """Eight requests that cannot all be held: some are retracted, and still answer the same."""
    new_tokens = 48
    flags = ("--max-total-tokens", "128", "--page-size", "1", "--schedule-conservativeness", "0.05")
    # Admission expects 4 tokens of each request, so all eight are let in.
    expectation = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "4"}
    with serve(checkpoints[family], 2, 2, "a2a", *flags, **expectation) as server:
        batch = [prompt(20, seed=seed) for seed in range(10, 18)]
        answers = server.generate_batch(batch, new_tokens)
        assert "Retract requests" in server.log()
        for tokens, answer in zip(batch, answers, strict=True):
            check(checkpoints[family], tokens, answer, new_tokens)
        everything_is_free(server)


@pytest.mark.server
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
    tmp_path: Path, family: str, backend: str, overrides: dict[str, Any]
) -> None:
    """The Triton adapter and the series' own kernels, a few tokens; slow, one server each."""
    checkpoint = make_checkpoint(family, tmp_path / family, num_hidden_layers=2, **overrides)
    flags = (
        *("--attention-backend", "triton", "--moe-runner-backend", "triton", "--dtype", "float32"),
        *("--chunked-prefill-size", "16", "--max-running-requests", "4"),
    )
    with serve(checkpoint, 2, 2, backend, *flags, TRITON_INTERPRET="1") as server:
        batch = [prompt(length, seed=6) for length in (1, 19)]
        for tokens, answer in zip(batch, server.generate_batch(batch, 3), strict=True):
            check(checkpoint, tokens, answer, 3)
        check(checkpoint, batch[1], server.generate(batch[1], 3), 3)
