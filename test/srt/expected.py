"""Random prompts, and what ``transformers`` answers to them: the oracle of all that serves.

It shares no code with SGLang. Whatever has a `completion` can be checked: an answer over HTTP, or
one of a scheduler without a server.
"""

import itertools
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sglang_cpu_reference.oracle import Completion, Oracle

# fp32 against fp32; the observed difference is below 1e-5.
LOGPROB_TOLERANCE = 1e-4


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random bytes; the first one tells prompts apart, so that none is another's prefix."""
    generator = random.Random(f"{length} {seed}")
    return [(length + 101 * seed) % 256, *(generator.randrange(256) for _ in range(length - 1))]


@cache
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@cache
def expected(checkpoint: Path, prompt: tuple[int, ...], new_tokens: int) -> Completion:
    return oracle(checkpoint).generate(prompt, new_tokens)


def check(checkpoint: Path, tokens: list[int], answer: Any, new_tokens: int) -> None:
    """The answer's completion has the oracle's tokens and log-probabilities."""
    want = expected(checkpoint, tuple(tokens), new_tokens)
    got = answer.completion
    assert got.token_ids == want.token_ids, f"prompt of {len(tokens)} tokens"
    for ours, theirs in zip(got.top, want.top, strict=True):
        assert [t for t, _ in ours] == [t for t, _ in theirs] or _tied(theirs)
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            assert abs(a - b) < LOGPROB_TOLERANCE, f"prompt of {len(tokens)} tokens"


def check_all(
    checkpoint: Path,
    batches: Sequence[Sequence[list[int]]],
    answers: Sequence[Sequence[Any]],
    new_tokens: int,
) -> None:
    """`check`, of every answer to every prompt of every batch."""
    for prompts, of_prompts in zip(batches, answers, strict=True):
        for tokens, answer in zip(prompts, of_prompts, strict=True):
            check(checkpoint, tokens, answer, new_tokens)


def _tied(top: list[tuple[int, float]]) -> bool:
    """Whether two neighbours are too close for their order to mean anything."""
    return any(a - b < LOGPROB_TOLERANCE for (_, a), (_, b) in itertools.pairwise(top))
