"""Draft models beside a sharded cache: the tokens of transformers, the drafts of plain TP.

Drafts decide how many tokens a pass yields, never which. So answers must be the oracle's whatever
the draft says, and how many of its drafts were right must be what a server without a sharded cache
counts: a draft that reads one wrong row of its cache drafts other tokens.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference import drafts
from srt.expected import check, prompt
from srt.fresh import Fresh
from srt.models.serving import Report, serve

NEW_TOKENS = 10
CHUNK = 20
BATCHES = (
    (prompt(2 * CHUNK + 5, seed=10),),
    (prompt(1, seed=11), prompt(CHUNK + 1, seed=12), prompt(7, seed=13)),
    (prompt(2 * CHUNK + 5, seed=10) + prompt(3, seed=14),),
)


def flags_of(algorithm: str, draft: Path | None, steps: int, topk: int, tokens: int) -> list[str]:
    """A server's flags for drafts of so many steps, branches and tokens."""
    flags = ["--speculative-algorithm", algorithm, "--speculative-num-steps", str(steps)]
    flags += ["--speculative-eagle-topk", str(topk)]
    flags += ["--speculative-num-draft-tokens", str(tokens)]
    flags += ["--chunked-prefill-size", str(CHUNK)]
    return flags + (["--speculative-draft-model-path", str(draft)] if draft else [])


CHAIN, TREE = (3, 1, 4), (2, 2, 5)
# Target and draft, its algorithm, and whether it was made to draft well.
FAMILIES: dict[str, tuple[Any, str, bool]] = {
    "eagle": (drafts.make_eagle, "EAGLE", True),
    "eagle of random weights": (lambda path: drafts.make_eagle(path, noise=1.0), "EAGLE", False),
    "eagle3": (drafts.make_eagle3, "EAGLE3", True),
    "mtp": (drafts.make_mtp, "NEXTN", True),
    "standalone": (lambda path: (drafts.make_eagle(path)[0],) * 2, "STANDALONE", True),
}
LAYOUTS = {
    "a2a": (2, ("--dcp-size", "2", "--dcp-comm-backend", "a2a")),
    "ag_rs, replicated": (2, ("--attn-tp-size", "1", "--dcp-comm-backend", "ag_rs")),
    "K 2 of 4": (4, ("--dcp-size", "2", "--dcp-comm-backend", "a2a")),
    "K 4": (4, ("--attn-tp-size", "1", "--dcp-comm-backend", "a2a")),
}
CASES = [
    ("eagle", CHAIN, "a2a", 1),
    ("eagle", CHAIN, "ag_rs, replicated", 4),
    ("eagle", CHAIN, "K 2 of 4", 1),
    ("eagle", CHAIN, "K 4", 1),
    ("eagle", TREE, "a2a", 1),
    ("eagle", TREE, "K 4", 1),
    ("eagle of random weights", CHAIN, "a2a", 1),
    ("eagle3", CHAIN, "a2a", 1),
    ("eagle3", TREE, "ag_rs, replicated", 1),
    ("standalone", CHAIN, "a2a", 4),
    ("mtp", CHAIN, "a2a", 1),
    ("mtp", CHAIN, "ag_rs, replicated", 4),
    ("mtp", TREE, "K 4", 1),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("drafts")
    return cache(lambda family: FAMILIES[family][0](root / family.replace(" ", "_")))


@pytest.fixture(scope="module")
def whole(models: Any) -> Iterator[Any]:
    """What a server without a sharded cache answers."""
    with Fresh("cpu_reference", preload=("srt.models.plugins_loaded",)) as processes:

        @cache
        def report(family: str, shape: tuple[int, int, int]) -> Report:
            target, draft = models(family)
            flags = (*flags_of(FAMILIES[family][1], draft, *shape), "--page-size", "1")
            return serve(processes, target, 1, flags, BATCHES, NEW_TOKENS)[0]

        yield report


def counts(report: Report) -> list[list[tuple[int, int]]]:
    """How many drafts of each request were right, and in how many passes."""
    return [[answered.drafts for answered in answers] for answers in report.answers]


@pytest.mark.parametrize(("family", "shape", "layout", "page"), CASES)
def test_drafts_are_those_of_a_whole_cache(
    ready: Fresh,
    models: Any,
    whole: Any,
    family: str,
    shape: tuple[int, int, int],
    layout: str,
    page: int,
) -> None:
    (target, draft), (_, algorithm, drafts_well) = models(family), FAMILIES[family]
    tp, flags = LAYOUTS[layout]
    flags = (*flags, *flags_of(algorithm, draft, *shape), "--page-size", str(page))
    for report in serve(ready, target, tp, flags, BATCHES, NEW_TOKENS):
        for prompts, answers in zip(BATCHES, report.answers, strict=True):
            for tokens, answered in zip(prompts, answers, strict=True):
                check(target, tokens, answered, NEW_TOKENS)
        assert report.answers[-1][0].cached_tokens > CHUNK
        assert counts(report) == counts(whole(family, shape))
        if drafts_well:
            assert all(right > 0 for answers in counts(report) for right, _ in answers)
