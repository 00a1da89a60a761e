"""Prefill on one server, decode on another: the answers stay those of ``transformers``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.disaggregation.pair import Side, failures, loses_decode, outcomes
from srt.expected import check, check_all, prompt
from srt.fresh import Fresh

NEW_TOKENS = 4
PAGE = 4
CHUNK = 32
SIZES = (
    *("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK)),
    *("--max-total-tokens", "2048"),
)
BY_TOKEN = ("--page-size", "1")
#: One token and the edges of a page and of two ranks' widened one, at once; several chunks; one
#: that continues another.
BATCHES = (
    [prompt(length) for length in (1, *(PAGE + d for d in (-1, 0, 1)), 7, 8, 9, 16)],
    [prompt(2 * CHUNK + 5, seed=1)],
    [prompt(2 * CHUNK + 5, seed=1) + prompt(6, seed=2), prompt(19, seed=3)],
)


#: What ranks of two servers have loaded: no hooks yet, which only a sharded one serves with.
LOADED = ("srt.models.plugins_loaded", "sglang.srt.disaggregation.mooncake.conn")


@pytest.fixture(scope="module")
def servers() -> Iterator[Fresh]:
    """Processes to be ranks of two servers."""
    with Fresh("cpu_reference", preload=LOADED) as processes:
        yield processes


def sharded(tp: int, *layout: str) -> Side:
    return Side(tp, (*SIZES, *layout))


PLAIN = sharded(1)
A2A = sharded(2, "--dcp-size", "2", "--dcp-comm-backend", "a2a")
AG_RS = sharded(2, "--dcp-size", "2", "--dcp-comm-backend", "ag_rs")
CACHED = Side(2, (*AG_RS.flags, "--disaggregation-decode-enable-radix-cache"))
CACHED_BY_TOKEN = Side(2, (*CACHED.flags, *BY_TOKEN))
HELIX = sharded(4, "--attn-tp-size", "2", "--dcp-comm-backend", "a2a")


@pytest.mark.parametrize(
    ("family", "prefill", "decode"),
    [
        ("llama", PLAIN, PLAIN),
        ("deepseek_v2", PLAIN, PLAIN),
        ("deepseek_v2", PLAIN, CACHED),
        ("deepseek_v2", PLAIN, HELIX),
        ("deepseek_v2", A2A, A2A),
        ("llama", sharded(2, *BY_TOKEN), CACHED_BY_TOKEN),
        ("llama", PLAIN, HELIX),
        ("llama", AG_RS, AG_RS),
    ],
    ids=[
        *("llama", "deepseek_v2", "1 to 2 that cache", "1 to 4 on 2 shards", "2 to 2, a2a"),
        *("llama: 2 to 2 that cache", "llama: 1 to 4 on 2 shards", "llama: 2 to 2, ag_rs"),
    ],
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
        hits = [answer.cached_tokens for answer in rank.value[-1]]
        # Of the prompt that continues another of 69 tokens, whole widened pages.
        assert hits == [{CACHED: 64, CACHED_BY_TOKEN: 68}.get(decode, 0), 0]
    assert sent[0].value[-1][0].cached_tokens >= 2 * CHUNK


@pytest.mark.parametrize("family", ["deepseek_v2", "llama"])
def test_symm_decodes_what_another_server_prefilled(tmp_path: Path, family: str) -> None:
    """By its kernels and Triton's attention, in the interpreter."""
    model = make_checkpoint(family, tmp_path / "model", num_hidden_layers=2)
    decode = Side(2, (*A2A.flags, "--attention-backend", "triton"), symm=True)
    batches = [[prompt(length) for length in (1, CHUNK + 5)]]
    with Fresh("cpu_reference", 500, LOADED, interpreted=True) as servers:
        sent, received = outcomes(servers, model, PLAIN, decode, batches, 3)
    for rank in sent + received:
        assert rank.status == 0, rank.output
    for rank in received:
        check_all(model, batches, rank.value, 3)


@pytest.mark.parametrize(
    ("family", "decode", "layout"),
    [("deepseek_v2", PLAIN, "--dcp-size 1"), ("llama", HELIX, "--dcp-size 2")],
    ids=["latents, to a plain one", "K and V, to another"],
)
def test_layouts_that_do_not_match_are_named(
    servers: Fresh, tmp_path: Path, family: str, decode: Side, layout: str
) -> None:
    """By both values, for each request, by the rank of either server that answers clients.

    Long before any of SGLang's timeouts, which are 300 seconds.
    """
    model = make_checkpoint(family, tmp_path / "model", num_hidden_layers=2)
    batches = [[prompt(9)], [prompt(5)]]
    sent, received = outcomes(servers, model, AG_RS, decode, batches, 2, within=60)
    for rank in (sent[0], received[0]):
        assert rank.status == 0, rank.output
        assert len(rank.value) == 2  # it goes on
        for [answer] in rank.value:
            assert answer.finish["type"] == "abort"
            message = answer.finish["message"]
            assert "the prefill server attends on 2 ranks with --dcp-size 2" in message
            assert f"the decode server on {decode.tp} with {layout}," in message


@pytest.mark.parametrize("family", ["deepseek_v2", "llama"])
def test_retracted_requests_are_answered(servers: Fresh, tmp_path: Path, family: str) -> None:
    """Their rows are kept by owner meanwhile: two answers that the decode pool holds one of."""
    model = make_checkpoint(family, tmp_path / "model", num_hidden_layers=2)
    small = ("--max-total-tokens", "24", "--num-reserved-decode-tokens", "1")
    decode = Side(2, (*A2A.flags, *small))
    prompts = [prompt(15, seed=seed) for seed in (1, 2)]
    _, received = outcomes(servers, model, PLAIN, decode, [prompts], 12)
    for rank in received:
        assert rank.status == 0, rank.output
        check_all(model, [prompts], rank.value, 12)
    assert "Retract requests" in received[0].output


@pytest.mark.parametrize("family", ["deepseek_v2", "llama"])
def test_failures_in_transfer(servers: Fresh, tmp_path: Path, family: str) -> None:
    """Aborted as it is written, or its prefill server killed: an error, and no slot is lost.

    Also none of a request that this server never came to, and of one that finds it gone.
    """
    model = make_checkpoint(family, tmp_path / "model", num_hidden_layers=2)
    tokens, stalls = prompt(3 * PAGE + 1), tmp_path / "stalls"
    sent, received = failures(servers, model, PLAIN, A2A, tokens, stalls)
    assert sent[0].status == 9, sent[0].output
    for rank in received:
        assert rank.status == 0, rank.output
        well, *failed = rank.value.answers
        check(model, tokens, well, 2)
        for answer in failed:
            assert answer.finish["type"] == "abort"
            assert not answer.completion.token_ids
        for answer in failed[1:]:
            assert "KVTransferError" in answer.finish["message"]
        assert max(rank.value.seconds) < 60
        assert len(set(rank.value.free)) == 1


@pytest.mark.parametrize("family", ["deepseek_v2", "llama"])
def test_a_decode_server_that_dies(servers: Fresh, tmp_path: Path, family: str) -> None:
    """As it is written to, and one that nobody starts again: an error, and no slot is lost."""
    model = make_checkpoint(family, tmp_path / "model", num_hidden_layers=2)
    sent, received = loses_decode(servers, model, PLAIN, A2A, prompt(3 * PAGE + 1))
    assert all(rank.status != 0 for rank in received)
    [rank] = sent
    assert rank.status == 0, rank.output
    well, *failed = rank.value.answers
    assert well.finish["type"] == "length"
    for answer, said in zip(failed, ("Failed to send kv chunk", "timed out after"), strict=True):
        assert answer.finish["type"] == "abort"
        assert said in answer.finish["message"]
    assert max(rank.value.seconds) < 60
    assert len(set(rank.value.free)) == 1
