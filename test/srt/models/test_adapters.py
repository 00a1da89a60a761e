"""Stand-ins for an attention backend's kernels, against transformers.

SGLang's schedulers, and a server by each of the backends but fa3, whose is in `test_end_to_end.py`.
"""

from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Server
from srt.expected import check, check_all, prompt
from srt.fresh import Fresh
from srt.models import serving
from srt.models.test_models import BATCHES, NEW_TOKENS
from srt.test_end_to_end import everything_is_free, lengths, on_stand_ins

EXCHANGES = ("a2a", "ag_rs")
DCP = ("--dcp-size", "2", "--dcp-comm-backend", "a2a")
DCP_4 = ("--dcp-size", "4", "--dcp-comm-backend", "ag_rs")
DECOUPLED = ("--attn-tp-size", "1", "--dcp-comm-backend", "ag_rs")
# Facts of a machine, as SGLang has them.
BLACKWELL = {"is_sm100": True, "is_sm100_or_sm110": True}
# FlashMLA's pages are 64 tokens of a rank; a chunk holds at least one page of all ranks.
CASES = [
    ("fa3", "llama", 2, DCP, 1, 80),
    ("fa3", "llama", 4, DECOUPLED, 16, 80),
    ("fa3", "deepseek_v2", 2, ("--dcp-size", "2", "--dcp-comm-backend", "ag_rs"), 1, 80),
    ("fa3", "deepseek_v2", 4, ("--attn-tp-size", "1", "--dcp-comm-backend", "a2a"), 8, 80),
    ("fa4", "llama", 2, DCP, 16, 80),
    ("fa4", "llama", 4, DECOUPLED, 1, 80),
    ("flashinfer", "llama", 2, DCP, 1, 70),
    ("flashinfer", "llama", 4, DECOUPLED, 16, 80),
    ("flashinfer", "deepseek_v2", 4, DCP_4, 8, 80),
    ("flashmla", "deepseek_v2", 2, DCP, 64, 128),
    ("flashmla", "deepseek_v2", 4, DECOUPLED, 64, 256),
]
# There SGLang has fa4 serve GQA with pages of 128 tokens, whatever was asked for.
ON_BLACKWELL = [
    ("fa4", "llama", 2, DECOUPLED, 128, 256),
    ("fa4", "deepseek_v2", 4, DCP_4, 16, 80),
    ("trtllm_mha", "llama", 2, DCP, 16, 80),
    ("trtllm_mha", "llama", 4, DECOUPLED, 16, 80),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    # Widths that the kernels exist for.
    widths = {"deepseek_v2": {"qk_nope_head_dim": 128, "v_head_dim": 128}}
    return {
        family: make_checkpoint(
            family, root / family, num_hidden_layers=2, **widths.get(family, {})
        )
        for family in ("llama", "deepseek_v2")
    }


def retracts(backend: str, family: str) -> bool:
    """Whether a case has a small pool, too: one of every backend."""
    return family == ("deepseek_v2" if backend == "flashmla" else "llama")


def small_pool(ranks: int, page: int) -> tuple[tuple[str, ...], list[list[int]]]:
    """A pool of one group, by its flags, and prompts that it cannot hold together to their end.

    Each has 28 tokens to come, of which admission expects 4.
    """
    widened = ranks * page
    # Admission counts a page for each beside its tokens; all but the shortest pages are crossed.
    rows, length = (13 * widened // ranks, widened - 24) if widened > 24 else (256 // ranks, 20)
    flags = ("--max-total-tokens", str(rows), "--schedule-conservativeness", "0.05")
    return flags, [prompt(length, seed=seed) for seed in range(30, 37)]


def served(
    rank: int, argv: list[str], many: list[list[int]]
) -> tuple[list[serving.Report], list[serving.Answer]]:
    """In a rank: answers to `BATCHES` by each exchange, and to prompts that do not fit together."""
    from sglang.srt.runtime_context import get_parallel

    scheduler, reports = serving.scheduler_of(rank, argv), []
    first = get_parallel().dcp_group.exchanger.name
    for _ in serving.each_exchange(scheduler, sorted(EXCHANGES, key=lambda name: name != first)):
        reports.append(serving.answer_all(scheduler, BATCHES, NEW_TOKENS))
    serving.expect_few_tokens()
    return reports, serving.answer(scheduler, many, 28)


def check_retracted(model: Path, many: list[list[int]], answers: list[serving.Answer]) -> None:
    """Some of them gave their slots back, and all were answered."""
    assert sum(answer.retractions for answer in answers) > 0
    for tokens, answer in zip(many, answers, strict=True):
        check(model, tokens, answer, 28)


def on_blackwell(
    rank: int, argv: list[str], many: list[list[int]]
) -> tuple[list[serving.Report], list[serving.Answer]]:
    """As `served`, where SGLang is told of a GPU that these backends are for."""
    from sglang.srt.runtime_context import override_platform

    with override_platform(**BLACKWELL):
        return served(rank, argv, many)


@pytest.mark.parametrize(
    ("ranks", "backend", "family", "tp", "layout", "page", "chunk"),
    [*((served, *case) for case in CASES), *((on_blackwell, *case) for case in ON_BLACKWELL)],
)
def test_equals_transformers(
    kernels: Fresh,
    checkpoints: dict[str, Path],
    ranks: Any,
    backend: str,
    family: str,
    tp: int,
    layout: tuple[str, ...],
    page: int,
    chunk: int,
) -> None:
    """By each exchange; where it retracts, requests go on."""
    model, (rows, many) = checkpoints[family], small_pool(tp, page)
    if tp > 2 or page > 64 or not retracts(backend, family):
        rows, many = ("--max-total-tokens", str(max(512, 16 * page))), []
    sizes = ("--page-size", str(page), "--chunked-prefill-size", str(chunk))
    flags = ("--attention-backend", backend, *layout, *sizes, *rows)
    argv = serving.command_line(model, tp, *flags)
    for reports, answers in kernels.ranks(ranks, tp, argv, many):
        for report in reports:
            check_all(model, BATCHES, report.answers, NEW_TOKENS)
            if page < 64:  # else no prompt fills a page of all ranks
                assert report.answers[-1][0].cached_tokens > 0
        if many:
            check_retracted(model, many, answers)


# Prefixes of several chunks, of two lengths in a batch, and none beside them.
LONG = (
    (prompt(300, seed=20),),
    (prompt(205, seed=21), prompt(1, seed=22)),
    (
        prompt(300, seed=20) + prompt(9, seed=23),
        prompt(205, seed=21) + prompt(70, seed=24),
        prompt(19, seed=25),
    ),
)


# The tokens of a prefix that are attended at once, and what SGLang then calls its method.
CAPACITIES = {"MHA_ONE_SHOT": 1024, "MHA_CHUNKED_KV": 96}


def prefilled(rank: int, argv: list[str]) -> dict[str, tuple[serving.Report, set[str]]]:
    """By method: a rank's answers, and how its model attended prompts with a cached prefix."""
    from sglang.srt.environ import envs
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    methods, dispatch = set[str](), DeepseekV2AttentionMLA.dispatch_attn_forward_method

    def noted(layer: Any, batch: Any) -> Any:
        method = dispatch(layer, batch)
        if any(batch.extend_prefix_lens_cpu or ()):
            methods.add(method.name)
        return method

    DeepseekV2AttentionMLA.dispatch_attn_forward_method = noted
    scheduler, found = serving.scheduler_of(rank, argv), {}
    for method, capacity in CAPACITIES.items():
        with envs.SGLANG_MAX_KV_CHUNK_CAPACITY.override(capacity):
            report = serving.answer_all(scheduler, LONG, NEW_TOKENS)
        found[method] = report, {*methods}
        methods.clear()
        scheduler.flush_cache()
    return found


@pytest.mark.parametrize(
    ("backend", "tp", "layout", "page", "chunk"),
    [
        ("fa3", 4, DECOUPLED, 1, 70),
        ("flashinfer", 2, DECOUPLED, 1, 70),
        ("flashmla", 2, DCP, 64, 256),
    ],
)
def test_a_long_prefix_is_attended_without_absorbing_it(
    kernels: Fresh,
    checkpoints: dict[str, Path],
    backend: str,
    tp: int,
    layout: tuple[str, ...],
    page: int,
    chunk: int,
) -> None:
    """What SGLang does from 8192 cached tokens on, and in chunks from 128K on."""
    model = checkpoints["deepseek_v2"]
    sizes = ("--page-size", str(page), "--chunked-prefill-size", str(chunk))
    flags = ("--attention-backend", backend, *layout, *sizes, "--max-total-tokens", "1024")
    argv = serving.command_line(model, tp, *flags)
    for found in kernels.ranks(prefilled, tp, argv, SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD="1"):
        assert {method: methods for method, (_, methods) in found.items()} == {
            method: {method} for method in CAPACITIES
        }
        for report, _ in found.values():
            check_all(model, LONG, report.answers, NEW_TOKENS)


@pytest.mark.server
@pytest.mark.parametrize(
    ("backend", "family", "layout", "page", "platform"),
    [
        ("flashinfer", "llama", DCP, 16, {}),
        ("flashmla", "deepseek_v2", DECOUPLED, 64, {}),
        ("fa4", "deepseek_v2", DECOUPLED, 1, BLACKWELL),
        ("trtllm_mha", "llama", DCP, 16, BLACKWELL),
    ],
)
def test_a_server(
    checkpoints: dict[str, Path],
    backend: str,
    family: str,
    layout: tuple[str, ...],
    page: int,
    platform: dict[str, bool],
) -> None:
    """Prompts about the edges of pages and chunks, at once, and one with a cached prefix."""
    model, chunk = checkpoints[family], 128 if page == 64 else 80
    flags = (*layout, "--page-size", str(page), "--chunked-prefill-size", str(chunk))
    flags += ("--attention-backend", backend, "--max-total-tokens", "1024")
    first = on_stand_ins(backend, **platform)
    with Server(model, "--tp", "2", *flags, prelude=first) as server:
        assert server.server_info()["attention_backend"] == backend
        prompts = [prompt(length) for length in lengths(page, 2, chunk)]
        for tokens, answer in zip(prompts, server.generate_batch(prompts, NEW_TOKENS), strict=True):
            check(model, tokens, answer, NEW_TOKENS)
        continued = prompts[-1] + prompt(5, seed=1)
        answer = server.generate(continued, NEW_TOKENS)
        check(model, continued, answer, NEW_TOKENS)
        assert answer.cached_tokens == len(prompts[-1]) // (2 * page) * 2 * page
        everything_is_free(server)
