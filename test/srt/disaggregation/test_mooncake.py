"""Prefill on one server, decode on another: the answers stay those of ``transformers``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.disaggregation.pair import Side, outcomes
from srt.expected import check, check_all, prompt
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
    with Fresh("cpu_reference", preload=preload) as processes:
        yield processes


def sharded(tp: int, *layout: str) -> Side:
    return Side(tp, (*SIZES, *layout))


PLAIN = sharded(1)
A2A = sharded(2, "--dcp-size", "2", "--dcp-comm-backend", "a2a")
AG_RS = sharded(2, "--dcp-size", "2", "--dcp-comm-backend", "ag_rs")
HELIX = sharded(4, "--attn-tp-size", "2", "--dcp-comm-backend", "a2a")


@pytest.mark.parametrize(
    ("family", "prefill", "decode"),
    [
        ("llama", PLAIN, PLAIN),
        ("deepseek_v2", PLAIN, PLAIN),
        ("deepseek_v2", PLAIN, A2A),
        ("deepseek_v2", PLAIN, HELIX),
        ("deepseek_v2", AG_RS, AG_RS),
    ],
    ids=["llama", "deepseek_v2", "1 to a2a of 2", "1 to 4 on 2 shards", "2 to 2, ag_rs"],
)
def test_answers_equal_transformers(
    servers: Fresh, tmp_path: Path, family: str, prefill: Side, decode: Side
) -> None:
    model = make_checkpoint(family, tmp_path / family, num_hidden_layers=2)
    sent, received = outcomes(servers, model, prefill, decode, BATCHES, NEW_TOKENS)
    for rank in sent + received:
        assert rank.status == 0, rank.output
    for rank in received:
        check_all(model, BATCHES, rank.value, NEW_TOKENS)


def test_layouts_that_do_not_match_are_named(servers: Fresh, tmp_path: Path) -> None:
    """By both values, for each request, by the prefill rank that answers clients; it goes on."""
    model = make_checkpoint("deepseek_v2", tmp_path / "model", num_hidden_layers=2)
    sent, _ = outcomes(servers, model, AG_RS, PLAIN, [[prompt(9)], [prompt(5)]], 2)
    assert sent[0].status == 0, sent[0].output
    for [answer] in sent[0].value:
        assert answer.finish["type"] == "abort"
        assert "--dcp-size 2" in answer.finish["message"]
        assert "the decode server with 1" in answer.finish["message"]


def test_retracted_requests_are_answered(servers: Fresh, tmp_path: Path) -> None:
    """Their rows are kept by owner meanwhile: two answers that the decode pool holds one of."""
    model = make_checkpoint("deepseek_v2", tmp_path / "model", num_hidden_layers=2)
    small = ("--max-total-tokens", "24", "--num-reserved-decode-tokens", "1")
    decode = Side(2, (*A2A.flags, *small))
    prompts = [prompt(15, seed=seed) for seed in (1, 2)]
    _, received = outcomes(servers, model, PLAIN, decode, [prompts], 12)
    for rank in received:
        assert rank.status == 0, rank.output
        for tokens, answer in zip(prompts, *rank.value, strict=True):
            check(model, tokens, answer, 12)
    assert "Retract requests" in received[0].output
