"""The real server over HTTP against ``transformers``, on the same fp32 checkpoint.

Every layout serves the same load, one request at a time and in batches. The oracle shares no code
with SGLang. Each rank checks at idle that no slot of its pool is lost (see
`managers/invariant_checker.py`); a rank that finds one lost ends the server, and the test with it.
"""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.oracle import Completion, Oracle
from sglang_cpu_reference.server import Generation, Server

FAMILIES = ("llama", "qwen3", "deepseek_v2")
LAYOUTS = ((1, 1), (2, 2), (4, 2), (4, 4))
BACKENDS = ("ag_rs", "a2a")
CASES = [
    (family, tp, dcp, backend)
    for family, (tp, dcp), backend in itertools.product(FAMILIES, LAYOUTS, BACKENDS)
    if dcp > 1 or backend == BACKENDS[0]
]
# Some layouts run with pages of 1, so that a widened page is as short as it can be.
PAGE_SIZES = {(2, 2): 64, (4, 2): 1, (4, 4): 16, (1, 1): 1}
# Odd multiples of the page, so that chunks end between pages of the group; a chunk holds at least
# one of those.
CHUNKS = {(2, 2): 192, (4, 2): 77, (4, 4): 80, (1, 1): 77}
NEW_TOKENS = 6
# fp32 against fp32; the observed difference is below 1e-5.
LOGPROB_TOLERANCE = 1e-4


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(256) for _ in range(length)]


def lengths(page: int, ranks: int, chunk: int) -> list[int]:
    """One token, fewer than K, around a page and around a page of the whole group."""
    edges = {page * ranks + d for d in (-1, 0, 1)} | {63, 64, 65}
    return sorted({1, max(1, ranks - 1), *edges, 2 * chunk + 3} - {0})


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("checkpoints")
    yield {family: make_checkpoint(family, root / family) for family in FAMILIES}


@cache
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@cache
def expected(checkpoint: Path, prompt: tuple[int, ...], new_tokens: int) -> Completion:
    return oracle(checkpoint).generate(prompt, new_tokens)


def check(checkpoint: Path, tokens: list[int], answer: Generation, new_tokens: int) -> None:
    want = expected(checkpoint, tuple(tokens), new_tokens)
    got = answer.completion
    assert got.token_ids == want.token_ids, f"prompt of {len(tokens)} tokens"
    for ours, theirs in zip(got.top, want.top, strict=True):
        assert [t for t, _ in ours] == [t for t, _ in theirs] or _tied(theirs)
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            assert abs(a - b) < LOGPROB_TOLERANCE, f"prompt of {len(tokens)} tokens"


def _tied(top: list[tuple[int, float]]) -> bool:
    """Whether two neighbours are too close for their order to mean anything."""
    return any(a - b < LOGPROB_TOLERANCE for (_, a), (_, b) in itertools.pairwise(top))


def serve(checkpoint: Path, tp: int, dcp: int, backend: str, *flags: str) -> Server:
    layout = ["--tp", str(tp)]
    if dcp > 1:
        layout += ["--dcp-size", str(dcp), "--dcp-comm-backend", backend]
    return Server(checkpoint, *layout, *flags)


def abort_midway(server: Server, tokens: list[int]) -> None:
    """Start a long request and abort it after its first tokens."""
    outcome: list[object] = []
    body = {
        "input_ids": tokens,
        "rid": "to-be-aborted",
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
    }
    request = threading.Thread(target=lambda: outcome.append(server.post("/generate", body)))
    request.start()
    time.sleep(1.0)
    server.post("/abort_request", {"rid": "to-be-aborted"})
    request.join(60)
    assert not request.is_alive()
    assert outcome, "the aborted request was not answered"
    assert outcome[0]["meta_info"]["finish_reason"]["type"] == "abort"  # type: ignore[index]


@pytest.mark.server
@pytest.mark.parametrize(("family", "tp", "dcp", "backend"), CASES)
def test_layout(checkpoints: dict[str, Path], family: str, tp: int, dcp: int, backend: str) -> None:
    checkpoint, page, chunk = checkpoints[family], PAGE_SIZES[tp, dcp], CHUNKS[tp, dcp]
    flags = ("--page-size", str(page), "--chunked-prefill-size", str(chunk))
    with serve(checkpoint, tp, dcp, backend, *flags) as server:
        if dcp > 1:
            assert server.server_info()["dcp_comm_backend"] == backend
        prompts = [prompt(length) for length in lengths(page, dcp, chunk)]
        for tokens in prompts:
            answer = server.generate(tokens, NEW_TOKENS)
            check(checkpoint, tokens, answer, NEW_TOKENS)
            assert answer.cached_tokens == 0

        # The same prefix again, continued differently: the tree answers whole widened pages.
        shared = prompts[-1]
        for tail in (prompt(5, seed=1), prompt(9, seed=2)):
            answer = server.generate(shared + tail, NEW_TOKENS)
            check(checkpoint, shared + tail, answer, NEW_TOKENS)
            assert 0 < answer.cached_tokens <= len(shared)
            assert answer.cached_tokens % (page * dcp) == 0

        # Eight at once, of mixed length, new to the cache.
        server.flush_cache()
        batch = [prompt(length, seed=3) for length in (1, 2, 3, 31, 64, 65, 130, 200)]
        for tokens, answer in zip(batch, server.generate_batch(batch, NEW_TOKENS), strict=True):
            check(checkpoint, tokens, answer, NEW_TOKENS)

        abort_midway(server, prompt(20, seed=4))
        again = prompt(33, seed=5)
        check(checkpoint, again, server.generate(again, NEW_TOKENS), NEW_TOKENS)
        everything_is_free(server)


def everything_is_free(server: Server) -> None:
    """Flush the prefix cache and wait for the idle check: no slot in use on rank 0."""
    time.sleep(0.5)
    server.flush_cache()
    state = server.server_info()["internal_states"][0]
    assert state["memory_usage"]["token_capacity"] > 0
