"""Prefixes that have left the pool come back from the host: the answers stay transformers'."""

import json
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Generation, Server
from srt.expected import check, prompt
from srt.test_end_to_end import everything_is_free, serve
from srt.underway import nothing_left_of

NEW_TOKENS = 4
PAGE = 4
# Rows of each rank's pool; the prompts below are twice as long in all.
ROWS = 128
PROMPTS = 6
FILES = ("--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "wait_complete")
FILES += ("--hicache-storage-backend-extra-config", json.dumps({"prefetch_threshold": PAGE}))


def cached(answer: Generation, source: str) -> int:
    """Prompt tokens that were found on the device, on the host, or in storage."""
    return int((answer.meta_info["cached_tokens_details"] or {}).get(source, 0))


Answers = list[tuple[list[int], Generation]]


def ask_and_continue(
    server: Server, prefixes: list[list[int]], new_tokens: int
) -> tuple[Answers, Answers]:
    """Prompts with their answers: the prefixes, then each continued, which meanwhile left the pool.

    The first two continued prompts come alone, the others two at once, whose pages are loaded in
    one transfer.
    """
    first = [server.generate(prefix, new_tokens) for prefix in prefixes]
    continued = [prefix + prompt(9, seed=number) for number, prefix in enumerate(prefixes)]
    answers = [server.generate(tokens, new_tokens) for tokens in continued[:2]]
    for number in range(2, len(continued), 2):
        answers += server.generate_batch(continued[number : number + 2], new_tokens)
    return list(zip(prefixes, first, strict=True)), list(zip(continued, answers, strict=True))


@pytest.mark.server
@pytest.mark.parametrize(
    ("family", "policy", "layout"),
    [
        ("llama", "write_through", "layer_first"),
        ("deepseek_v2", "write_back", "page_first_direct"),
    ],
)
def test_prefixes_come_back_from_the_host(
    tmp_path: Path, family: str, policy: str, layout: str
) -> None:
    checkpoint, tp, dcp = make_checkpoint(family, tmp_path / family), 2, 2
    flags = (
        *("--page-size", str(PAGE), "--max-total-tokens", str(ROWS), "--enable-cache-report"),
        *("--chunked-prefill-size", "24", "--enable-hierarchical-cache", "--hicache-ratio", "8"),
        *("--hicache-write-policy", policy, "--hicache-mem-layout", layout, *FILES),
    )
    files = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path / "pages")}
    length = 2 * ROWS * dcp // PROMPTS
    prefixes = [prompt(length + number, seed=number) for number in range(PROMPTS)]
    whole_pages = [len(prefix) // (PAGE * dcp) * PAGE * dcp for prefix in prefixes]
    # That of MLA is started by the command: GQA's is by benchmark/test_serve_cli.py, and plain TP.
    cold = family == "deepseek_v2"
    server = serve(checkpoint, tp, dcp, "a2a", *flags, late_env=files, cold=cold)
    assert server.warm != cold
    with nothing_left_of(server):
        first, continued = ask_and_continue(server, prefixes, NEW_TOKENS)
        for tokens, answer in first:
            check(checkpoint, tokens, answer, NEW_TOKENS)
            assert answer.cached_tokens == 0
        for pages, (tokens, answer) in zip(whole_pages, continued, strict=True):
            check(checkpoint, tokens, answer, NEW_TOKENS)
            assert cached(answer, "host") == answer.cached_tokens == pages
        everything_is_free(server)

        # Nothing is left on device or host, so what is found now is in the files.
        for pages, tokens in zip(whole_pages, prefixes, strict=True):
            answer = server.generate(tokens, NEW_TOKENS)
            check(checkpoint, tokens, answer, NEW_TOKENS)
            assert cached(answer, "storage") == answer.cached_tokens >= pages - PAGE * dcp
