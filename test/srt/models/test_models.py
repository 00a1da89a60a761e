"""Model families and head layouts against ``transformers``, on several ranks.

Each case serves the same load: a prompt of several chunks, a batch of three that is new to the
cache, and a prompt that continues a cached one; one of the three is retracted and resumes. Every
rank must give the oracle's tokens and log-probabilities, and a rank's pool must hold as much as the
layout says.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check_all, prompt
from srt.fresh import Fresh
from srt.models.serving import Report, serve, serve_by_each
from srt.test_end_to_end import row_bytes

NEW_TOKENS = 4
PAGE = 2
ROWS = 512
# A multiple of the page, and not of the widened page of any K from 2 to 8.
CHUNK = 38
BATCHES = (
    (prompt(2 * CHUNK + 5, seed=10),),
    (prompt(1, seed=11), prompt(CHUNK + 1, seed=12), prompt(19, seed=13)),
    (prompt(2 * CHUNK + 5, seed=10) + prompt(6, seed=14),),
)
SIZES = (
    *("--page-size", str(PAGE), "--chunked-prefill-size", str(CHUNK)),
    *("--max-total-tokens", str(ROWS)),
)
BACKENDS = ("ag_rs", "a2a")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(family: str, **overrides: Any) -> Path:
        name = "-".join([family, *(f"{key}={value}" for key, value in overrides.items())])
        return make_checkpoint(family, root / name, **overrides)

    return make


def serve_and_check(
    ready: Fresh,
    model: Path,
    tp: int,
    attn_tp: int,
    backend: str,
    *flags: str,
    replicated: bool = True,
) -> list[Report]:
    """Serve the load with replicated or with gathered queries, and check every answer."""
    sizes = ("--attn-tp-size", attn_tp) if replicated else ("--dcp-size", tp // attn_tp)
    layout = (*map(str, sizes), "--dcp-comm-backend", backend, *flags)
    reports = serve(ready, model, tp, (*layout, *SIZES), BATCHES, NEW_TOKENS, retracting=True)
    check_reports(model, reports, PAGE * tp // attn_tp)
    return reports


def check_reports(model: Path, reports: list[Report], widened: int) -> None:
    for report in reports:
        check_all(model, BATCHES, report.answers, NEW_TOKENS)
        # The cache answers whole widened pages.
        assert report.answers[-1][0].cached_tokens == len(BATCHES[0][0]) // widened * widened


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2 without q_lora": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {}),
}


@pytest.mark.parametrize("model", MODELS)
def test_model_equals_transformers(ready: Fresh, checkpoint: Any, model: str) -> None:
    family, overrides = MODELS[model]
    serve_and_check(ready, checkpoint(family, **overrides), 4, 2, "a2a")


@pytest.mark.parametrize("kv_heads", [4, None], ids=["kv4", "mla"])
def test_head_shards_with_gathered_queries(
    ready: Fresh, checkpoint: Any, kv_heads: int | None
) -> None:
    """A below the key-value heads: the ranks of a group share theirs, and not their queries."""
    model = small(checkpoint, kv_heads)
    serve_and_check(ready, model, 4, 2, "a2a", "--no-dcp-replicate-q-proj")


# Every A that divides N, except N itself: that is plain TP.
LAYOUTS = [(tp, a) for tp in (2, 4, 8) for a in range(1, tp) if tp % a == 0]
KV_HEADS = (1, 2, 4, 8, None)  # None: MLA


def small(checkpoint: Any, kv_heads: int | None) -> Path:
    if kv_heads is None:
        return checkpoint("deepseek_v2", num_hidden_layers=2)
    return checkpoint("llama", num_hidden_layers=2, num_key_value_heads=kv_heads)


def plain_pool(model: Path, tp: int) -> tuple[int, int]:
    """Tokens and bytes of a rank's pool under plain TP."""
    return ROWS, (ROWS + PAGE) * row_bytes(model, tp)


@pytest.fixture(scope="module")
def without_the_series() -> Iterator[Fresh]:
    with Fresh("cpu_reference", preload=("srt.models.plugins_loaded",)) as processes:
        yield processes


# Whole heads, replicated ones, latents.
@pytest.mark.parametrize(("tp", "kv_heads"), [(2, 8), (2, 1), (8, 4), (2, None)])
def test_pool_of_plain_tp(
    without_the_series: Fresh, checkpoint: Any, tp: int, kv_heads: int | None
) -> None:
    """What layouts are compared with."""
    model = small(checkpoint, kv_heads)
    for report in serve(without_the_series, model, tp, SIZES, (), 0):
        assert (report.kv_tokens, report.kv_bytes) == plain_pool(model, tp)


@pytest.mark.parametrize("kv_heads", KV_HEADS, ids=lambda heads: f"kv{heads}" if heads else "mla")
@pytest.mark.parametrize(("tp", "attn_tp"), LAYOUTS, ids=[f"tp{n}-A{a}" for n, a in LAYOUTS])
def test_layout_equals_transformers(
    ready: Fresh, checkpoint: Any, tp: int, attn_tp: int, kv_heads: int | None
) -> None:
    """With each exchange."""
    model = small(checkpoint, kv_heads)
    flags = ("--attn-tp-size", str(attn_tp), *SIZES)
    by_rank = serve_by_each(ready, model, tp, flags, BACKENDS, BATCHES, NEW_TOKENS)
    for reports in zip(*by_rank, strict=True):
        check_reports(model, list(reports), PAGE * tp // attn_tp)
    kvp_size = tp // attn_tp
    if kv_heads is None:
        times = kvp_size
    else:
        times = max(1, kv_heads // tp) * kvp_size // max(1, kv_heads // attn_tp)
    tokens, nbytes = plain_pool(model, tp)
    for ours, *_ in by_rank:
        # Tokens in a byte of a rank's memory, beside plain TP.
        assert ours.kv_tokens * nbytes == times * tokens * ours.kv_bytes
