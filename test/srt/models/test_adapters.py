"""SGLang's schedulers on stand-ins for an attention backend's kernels, against transformers."""

from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check, check_all, prompt
from srt.fresh import Fresh
from srt.models import serving
from srt.models.serving import serve
from srt.models.test_models import BATCHES, NEW_TOKENS

DCP = ("--dcp-size", "2", "--dcp-comm-backend", "a2a")
DECOUPLED = ("--attn-tp-size", "1", "--dcp-comm-backend", "ag_rs")
# FlashMLA's pages are 64 tokens of a rank; a chunk holds at least one page of all ranks.
CASES = [
    ("fa3", "llama", 2, DCP, 1, 80),
    ("fa3", "llama", 4, DECOUPLED, 16, 80),
    ("fa3", "deepseek_v2", 2, ("--dcp-size", "2", "--dcp-comm-backend", "ag_rs"), 1, 80),
    ("fa3", "deepseek_v2", 4, ("--attn-tp-size", "1", "--dcp-comm-backend", "a2a"), 8, 80),
    ("fa4", "llama", 2, DCP, 16, 80),
    ("flashinfer", "llama", 2, DCP, 1, 70),
    ("flashinfer", "llama", 4, DECOUPLED, 16, 80),
    ("flashinfer", "deepseek_v2", 2, DCP, 1, 70),
    ("flashmla", "deepseek_v2", 2, DCP, 64, 128),
    ("flashmla", "deepseek_v2", 4, DECOUPLED, 64, 256),
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


@pytest.mark.parametrize(("backend", "family", "tp", "layout", "page", "chunk"), CASES)
def test_equals_transformers(
    kernels: Fresh,
    checkpoints: dict[str, Path],
    backend: str,
    family: str,
    tp: int,
    layout: tuple[str, ...],
    page: int,
    chunk: int,
) -> None:
    sizes = ("--page-size", str(page), "--chunked-prefill-size", str(chunk))
    rows = ("--max-total-tokens", str(max(512, 16 * page)))
    flags = ("--attention-backend", backend, *layout, *sizes, *rows)
    reports = serve(kernels, checkpoints[family], tp, flags, BATCHES, NEW_TOKENS)
    for report in reports:
        check_all(checkpoints[family], BATCHES, report.answers, NEW_TOKENS)
        if page < 64:  # else no prompt fills a page of all ranks
            assert report.answers[-1][0].cached_tokens > 0


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


def prefilled(rank: int, argv: list[str], ranks: int) -> tuple[serving.Report, set[str]]:
    """A rank's answers, and how its model attended prompts with a cached prefix."""
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    methods, dispatch = set(), DeepseekV2AttentionMLA.dispatch_attn_forward_method

    def noted(layer: Any, batch: Any) -> Any:
        method = dispatch(layer, batch)
        if any(batch.extend_prefix_lens_cpu or ()):
            methods.add(method.name)
        return method

    DeepseekV2AttentionMLA.dispatch_attn_forward_method = noted
    return serving._serve(rank, argv, ranks, LONG, NEW_TOKENS), methods


@pytest.mark.parametrize(
    ("method", "capacity"), [("MHA_ONE_SHOT", 1024), ("MHA_CHUNKED_KV", 96)], ids=["once", "chunks"]
)
@pytest.mark.parametrize(
    ("backend", "tp", "layout", "page", "chunk"),
    [
        ("fa3", 4, DECOUPLED, 1, 70),
        ("flashinfer", 2, DCP, 1, 70),
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
    method: str,
    capacity: int,
) -> None:
    """What SGLang does from 8192 cached tokens on, and in chunks from 128K on."""
    sizes = ("--page-size", str(page), "--chunked-prefill-size", str(chunk))
    flags = ("--attention-backend", backend, *layout, *sizes, "--max-total-tokens", "1024")
    found = kernels.ranks(
        prefilled,
        tp,
        serving.command_line(checkpoints["deepseek_v2"], tp, *flags),
        tp,
        SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD="1",
        SGLANG_MAX_KV_CHUNK_CAPACITY=str(capacity),
    )
    for report, methods in found:
        assert methods == {method}
        check_all(checkpoints["deepseek_v2"], LONG, report.answers, NEW_TOKENS)


def on_blackwell(rank: int, argv: list[str], ranks: int) -> serving.Report:
    """A rank's answers where SGLang is told of a GPU that these backends are for."""
    from sglang.srt.runtime_context import override_platform

    with override_platform(is_sm100=True, is_sm100_or_sm110=True):
        return serving._serve(rank, argv, ranks, BATCHES, NEW_TOKENS)


@pytest.mark.parametrize(
    ("backend", "family", "tp", "layout"),
    [("trtllm_mha", "llama", 4, DECOUPLED), ("fa4", "deepseek_v2", 2, DCP)],
)
def test_equals_transformers_on_blackwell(
    kernels: Fresh,
    checkpoints: dict[str, Path],
    backend: str,
    family: str,
    tp: int,
    layout: tuple[str, ...],
) -> None:
    sizes = ("--page-size", "16", "--chunked-prefill-size", "80", "--max-total-tokens", "512")
    flags = ("--attention-backend", backend, *layout, *sizes)
    argv = serving.command_line(checkpoints[family], tp, *flags)
    for report in kernels.ranks(on_blackwell, tp, argv, tp):
        check_all(checkpoints[family], BATCHES, report.answers, NEW_TOKENS)


MANY = [prompt(20, seed=seed) for seed in range(30, 38)]


def test_retracted_requests_go_on(kernels: Fresh, checkpoints: dict[str, Path]) -> None:
    """128 rows a rank are 256 tokens, eight requests want 60 each, and are expected to want 24."""
    sizes = ("--page-size", "1", "--max-total-tokens", "128", "--schedule-conservativeness", "0.05")
    argv = serving.command_line(checkpoints["llama"], 2, "--attention-backend", "fa3", *DCP, *sizes)
    for answers in kernels.ranks(serving.oversubscribed, 2, argv, MANY, 40):
        assert sum(answer.retractions for answer in answers) > 0
        for tokens, answer in zip(MANY, answers, strict=True):
            check(checkpoints["llama"], tokens, answer, 40)
