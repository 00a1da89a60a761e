"""Prefill on one server, decode on another: the answers stay those of ``transformers``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.disaggregation.pair import Side, outcomes
from srt.expected import check, prompt
from srt.fresh import Fresh

NEW_TOKENS = 4
PAGE = 4
CHUNK = 32
SIZES = (
    *("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK)),
    *("--max-total-tokens", "2048"),
)
#: One token; the edges of a page and of two ranks' widened one, at once; several chunks; one that
#: continues another.
BATCHES = (
    [prompt(1)],
    [prompt(length) for length in (PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1)],
    [prompt(2 * CHUNK + 5, seed=1)],
    [prompt(2 * CHUNK + 5, seed=1) + prompt(6, seed=2), prompt(19, seed=3)],
)


@pytest.fixture(scope="module")
def servers() -> Iterator[Fresh]:
    """Processes that have loaded the plugins, to be ranks of two servers."""
    preload = ("srt.models.plugins_loaded", "sglang.srt.disaggregation.mooncake.conn")
    with Fresh("cpu_reference", timeout=150, preload=preload) as processes:
        yield processes


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_plain_servers_equal_transformers(servers: Fresh, tmp_path: Path, family: str) -> None:
    model = make_checkpoint(family, tmp_path / family, num_hidden_layers=2)
    side = Side(1, SIZES)
    sent, received = outcomes(servers, model, side, side, BATCHES, NEW_TOKENS)
    for rank in sent + received:
        assert rank.status == 0, rank.output
    for rank in received:
        for prompts, answers in zip(BATCHES, rank.value, strict=True):
            for tokens, answer in zip(prompts, answers, strict=True):
                check(model, tokens, answer, NEW_TOKENS)
