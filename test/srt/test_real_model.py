"""Text, not random weights: SmolLM2-135M-Instruct in two layouts against ``transformers``.

One long prompt serves everything: a report with a fact hidden early, and a question at its end.
Its log-probabilities are compared token by token, and eight conversations continue from it at once,
whose common prefix the cache has.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sglang_cpu_reference.demo_real import FLAGS, LAYOUTS, chat, prose, read
from sglang_cpu_reference.oracle import Completion, Oracle
from sglang_cpu_reference.server import Server
from sglang_cpu_reference.smollm2 import UnreachableError, fetch
from srt.expected import LOGPROB_TOLERANCE

# Of the report, 31,000 characters long: more than 4,000 tokens.
CHARACTERS = 18_500
FACT = "\nThe secret code of the committee is 7402.\n"
QUESTIONS = (
    "What is the secret code of the committee? Answer with the number.",
    "Repeat the secret code of the committee.",
    "Which pandemic is the report about?",
    "Who creates advisory commissions?",
    "Name one terrorist attack that the report names.",
    "Is this report about commissions or about cars?",
    "Write the first word of the report.",
    "Say hello.",
)
NEW_TOKENS = 14  # where it ends its answer to the first
# Rows of each rank's pool: enough for all at once.
POOL = ("--max-total-tokens", "8192")


class Expected(NamedTuple):
    """What transformers makes of it. prefix: tokens that all conversations begin with.

    cache: transformers' own, of the prefix.
    """

    prefix: list[int]
    logprobs: list[float]
    conversations: list[list[int]]
    oracle: Oracle
    cache: Any
    tokenizer: Any

    def completion(self, number: int, answer: list[int]) -> Completion:
        """What it says where a conversation was answered so: the same, or the answer is wrong."""
        rest = self.conversations[number][len(self.prefix) :]
        return self.oracle.follow(rest, answer, self.cache)

    def text(self, answer: list[int]) -> str:
        """An answer up to where the model ends it."""
        stop = self.tokenizer.eos_token_id
        end = answer.index(stop) if stop in answer else len(answer)
        return self.tokenizer.decode(answer[:end])


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    try:
        return fetch()
    except UnreachableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Expected:
    from transformers import AutoTokenizer

    tokenizer, oracle = AutoTokenizer.from_pretrained(checkpoint), Oracle(checkpoint, "sdpa")
    conversations = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message(question)}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for question in QUESTIONS
    ]
    columns = zip(*conversations, strict=False)
    shared = next(place for place, tokens in enumerate(columns) if len({*tokens}) > 1)
    prefix = conversations[0][:shared]
    logprobs, cache = oracle.read(prefix)
    return Expected(prefix, logprobs, conversations, oracle, cache, tokenizer)


def message(question: str) -> str:
    report = prose()[:CHARACTERS]
    return f"{report[:1500]}{FACT}{report[1500:]}\n\nQuestion: {question}"


def streamed(events: str) -> list[str]:
    """The pieces of text of a streamed chat."""
    data = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data:")]
    assert data.pop() == "[DONE]"
    deltas = [choice["delta"] for event in data for choice in json.loads(event)["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


@pytest.mark.server
@pytest.mark.timeout(1200)  # the oracle reads 4,000 tokens first
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "tp 3"])
def test_text_equals_transformers(checkpoint: Path, expected: Expected, layout: str) -> None:
    with Server(checkpoint, *LAYOUTS[layout], *FLAGS, *POOL, "--enable-cache-report") as server:
        assert len(expected.prefix) > 4000
        logprobs = read(server, expected.prefix)
        for ours, theirs in zip(logprobs, expected.logprobs, strict=True):
            assert abs(ours - theirs) < LOGPROB_TOLERANCE

        answers = server.generate_batch(expected.conversations, NEW_TOKENS)
        for number, answer in enumerate(answers):
            assert len(answer.completion.token_ids) == NEW_TOKENS
            want = expected.completion(number, answer.completion.token_ids)
            assert answer.completion.token_ids == want.token_ids, QUESTIONS[number]
            for ours, theirs in zip(answer.completion.logprobs, want.logprobs, strict=True):
                assert abs(ours - theirs) < LOGPROB_TOLERANCE
            assert answer.cached_tokens > 4000
        assert "7402" in answers[0].text

        text = streamed(chat(server, message(QUESTIONS[0]), NEW_TOKENS, stream=True))
        assert len(text) > 1
        assert "".join(text) == expected.text(answers[0].completion.token_ids)
