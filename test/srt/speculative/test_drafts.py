"""Draft models beside a sharded cache: the tokens of transformers, the drafts of plain TP.

Drafts decide how many tokens a pass yields, never which. So answers must be the oracle's whatever
the draft says, and how many of its drafts were right must be what a server without a sharded cache
counts: a draft that reads one wrong row of its cache drafts other tokens.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sglang_cpu_reference import drafts
from sglang_cpu_reference.server import Server
from srt import poison
from srt.expected import LOGPROB_TOLERANCE, check, check_all, oracle, prompt
from srt.fresh import Fresh
from srt.models.serving import (
    Answer,
    Report,
    answer,
    answer_all,
    command_line,
    expect_few_tokens,
    scheduler_of,
    serve,
)
from srt.test_end_to_end import abort_midway, everything_is_free

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
    "mtp of usual widths": (
        lambda path: drafts.make_mtp(path, qk_nope_head_dim=128, v_head_dim=128),
        "NEXTN",
        True,
    ),
    "mtp of glm": (lambda path: drafts.make_mtp(path, "glm4_moe"), "NEXTN", True),
    "mtp of qwen": (drafts.make_qwen_mtp, "NEXTN", True),
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
    ("mtp", CHAIN, "a2a", 16),
    ("mtp", CHAIN, "ag_rs, replicated", 4),
    ("mtp", TREE, "K 4", 1),
    ("mtp of glm", CHAIN, "K 4", 1),
    ("mtp of glm", TREE, "ag_rs, replicated", 1),
    ("mtp of qwen", CHAIN, "a2a", 1),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("drafts")
    return cache(lambda family: FAMILIES[family][0](root / family.replace(" ", "_")))


@pytest.fixture(scope="module")
def whole(models: Any) -> Iterator[Any]:
    """What a server of as many ranks answers without a sharded cache."""
    with Fresh("cpu_reference", preload=("srt.models.plugins_loaded",)) as processes:

        @cache
        def report(family: str, shape: tuple[int, int, int], tp: int) -> Report:
            target, draft = models(family)
            flags = (*flags_of(FAMILIES[family][1], draft, *shape), "--page-size", "1")
            return serve(processes, target, tp, flags, BATCHES, NEW_TOKENS)[0]

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
    if page > 4:  # a chunk holds a page of all ranks
        flags += ("--chunked-prefill-size", str(tp * page))
    for report in serve(ready, target, tp, flags, BATCHES, NEW_TOKENS):
        check_all(target, BATCHES, report.answers, NEW_TOKENS)
        assert report.answers[-1][0].cached_tokens > CHUNK
        assert counts(report) == counts(whole(family, shape, tp))
        if drafts_well:
            assert all(right > 0 for answers in counts(report) for right, _ in answers)


def over_poison(rank: int, argv: list[str], batches: Any) -> Report:
    """In a rank's process: its answers, each pass of the target over a page 0 of NaN."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    scheduler = scheduler_of(rank, argv)
    assert poison.TARGET not in HookRegistry._patched, "which a server's poison could not hook"
    runner, name = scheduler.tp_worker.model_runner, poison.TARGET.rpartition(".")[2]
    forward = getattr(runner, name)

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        poison.poison(runner)
        return forward(*args, **kwargs)

    setattr(runner, name, poisoned)
    return answer_all(scheduler, batches, NEW_TOKENS)


@pytest.mark.parametrize(
    ("backend", "family", "page"),
    [
        ("fa3", "eagle", 1),
        ("fa3", "mtp of usual widths", 1),
        ("flashinfer", "eagle", 1),
        ("flashinfer", "mtp of usual widths", 4),
        ("flashmla", "mtp of usual widths", 64),
    ],
)
def test_verified_by(
    kernels: Fresh, models: Any, whole: Any, backend: str, family: str, page: int
) -> None:
    """On stand-ins for the kernels, over a page 0 of NaN."""
    target, draft = models(family)
    flags = (*LAYOUTS["a2a"][1], *flags_of(FAMILIES[family][1], draft, *CHAIN))
    flags += ("--attention-backend", backend, "--cuda-graph-backend-decode", "disabled")
    flags += ("--speculative-draft-attention-backend", "torch_native", "--page-size", str(page))
    if page > 4:
        flags += ("--chunked-prefill-size", str(2 * page))
    batches = BATCHES[1:2]
    argv = command_line(target, 2, *flags)
    for report in kernels.ranks(over_poison, 2, argv, batches):
        check_all(target, batches, report.answers, NEW_TOKENS)
        assert counts(report)[0] == counts(whole(family, CHAIN, 2))[1]


def without_scope(rank: int, argv: list[str]) -> None:
    """In a rank's process: SGLang's workers enter nothing around what they do with the draft."""
    from sglang.srt.speculative import eagle_worker_v2

    eagle_worker_v2.draft_tp_context = lambda layout: nullcontext()
    scheduler_of(rank, argv)


def test_a_draft_outside_its_scope_is_an_error(ready: Fresh, models: Any) -> None:
    target, draft = models("eagle")
    argv = command_line(target, 2, *LAYOUTS["a2a"][1], *flags_of("EAGLE", draft, *CHAIN))
    for outcome in ready.outcomes([(without_scope, rank, argv) for rank in range(2)]):
        assert outcome.status == 1
        assert "SeriesError" in outcome.output


def test_branches_in_pages_of_the_group(interpreted: Fresh, models: Any, whole: Any) -> None:
    """Triton reads the branches of a tree by pages: the allocator's, here of two tokens."""
    target, draft = models("eagle")
    flags = (*LAYOUTS["a2a"][1], *flags_of("EAGLE", draft, *TREE), "--page-size", "1")
    flags += ("--attention-backend", "triton", "--cuda-graph-backend-decode", "disabled")
    prompts = BATCHES[1][1:]
    for report in serve(interpreted, target, 2, flags, (prompts,), NEW_TOKENS):
        check_all(target, (prompts,), report.answers, NEW_TOKENS)
        assert counts(report)[0] == counts(whole("eagle", TREE, 2))[1][1:]


class Measured(NamedTuple):
    """A rank's answers, what its pools take, and what was counted for them."""

    answers: list[Answer]
    kv_bytes: int
    counted: int


def measured(rank: int, argv: list[str], prompts: list[list[int]], new_tokens: int) -> Measured:
    """In a rank's process: serve prompts at once, of which admission expects too little."""
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator
    from sglang_helix.srt.managers.scheduler import kv_bytes

    scheduler = scheduler_of(rank, argv)
    expect_few_tokens()
    target, draft = scheduler.tp_worker.model_runner, scheduler.draft_worker.draft_worker
    pools = [runner.token_to_kv_pool for runner in (target, draft.draft_runner)]
    a_row = DefaultPoolConfigurator(target.kv_cache_configurator)._cell_size
    return Measured(
        answer(scheduler, prompts, new_tokens),
        sum(map(kv_bytes, pools)),
        a_row * (pools[0].size + pools[0].page_size),
    )


@pytest.mark.parametrize(
    ("family", "layout"), [("eagle", "K 2 of 4"), ("standalone", "K 4"), ("mtp", "a2a")]
)
def test_a_small_pool_and_its_draft(ready: Fresh, models: Any, family: str, layout: str) -> None:
    """Memory of both pools is as it was counted; requests put back answer the same."""
    target, draft = models(family)
    tp, flags = LAYOUTS[layout]
    flags = (*flags, *flags_of(FAMILIES[family][1], draft, *CHAIN), "--page-size", "1")
    flags += ("--schedule-conservativeness", "0.05", "--max-total-tokens", str(200 // tp))
    prompts = [prompt(20, seed=seed) for seed in range(5)]
    argv = command_line(target, tp, *flags)
    for rank in ready.ranks(measured, tp, argv, prompts, 40):
        assert rank.kv_bytes == rank.counted
        assert sum(answered.retractions for answered in rank.answers)
        for tokens, answered in zip(prompts, rank.answers, strict=True):
            check(target, tokens, answered, 40)


@pytest.mark.server
def test_a_server_with_drafts(models: Any) -> None:
    """Grammar, abort, prompts' scores and what a request is told of its drafts, over HTTP."""
    target, draft = models("eagle")
    flags = flags_of("EAGLE", draft, *CHAIN)
    with Server(target, "--tp", "2", *LAYOUTS["a2a"][1], *flags, "--page-size", "4") as server:
        tokens = prompt(29, seed=20)
        answered = server.generate(tokens, NEW_TOKENS)
        check(target, tokens, answered, NEW_TOKENS)
        right, passes = (
            answered.meta_info[f"spec_{n}"] for n in ("num_correct_drafts", "verify_ct")
        )
        assert 0 < right <= 3 * passes < 3 * NEW_TOKENS
        sampling = {"temperature": 0, "max_new_tokens": 20, "regex": "(ab|cd){3}"}
        body = {"input_ids": tokens, "sampling_params": sampling}
        assert re.fullmatch("(ab|cd){3}", server.post("/generate", body)["text"])
        # The prompt's tokens are drafted by nobody, and scored all the same.
        body = {"input_ids": tokens, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        scored = server.post("/generate", {**body, "return_logprob": True, "logprob_start_len": 0})
        found = [entry[0] for entry in scored["meta_info"]["input_token_logprobs"][1:]]
        assert found == pytest.approx(oracle(target).read(tokens)[0], abs=LOGPROB_TOLERANCE)
        abort_midway(server, prompt(20, seed=4))
        everything_is_free(server)
