"""Hybrid models: recurrent states beside a cache, in plain TP and sharded, and ``transformers``.

Full attention layers are sharded by sequence, states stay as plain TP keeps them. A prefix can be
answered from where the tree has a state: at whole pages of the group and chunks of the kernels. Of
the batch of three a request is retracted, and resumes.
Every rank checks at idle that no slot of the cache and no state is lost.
"""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_cpu_reference.checkpoints import FAMILIES, make_checkpoint
from sglang_helix.srt.managers.invariant_checker import check_full_pool
from srt.expected import check_all, prompt
from srt.fresh import Fresh
from srt.models.serving import (
    Answer,
    Report,
    answer,
    command_line,
    expect_few_tokens,
    scheduler_of,
    serve,
)

NEW_TOKENS = 4
ROWS = 256
FIRST = prompt(197, seed=20)
# Prompts, and how many tokens of each the cache answers where states are kept every 64 tokens.
BATCHES = (
    (FIRST,),
    (prompt(1, seed=21), prompt(65, seed=22), prompt(19, seed=23)),
    (FIRST + prompt(6, seed=24),),
    (FIRST[:130] + prompt(7, seed=25),),
    (FIRST[:100] + prompt(8, seed=26),),
)
#: By K: tokens of a page and of a chunk, and those that the cache has of each batch's first prompt.
#: Chunks are not cut to what states are kept at in plain TP.
LAYOUTS = {
    1: (2, 100, [0, 0, 64, 128, 64]),
    2: (2, 100, [0, 0, 192, 128, 64]),
    4: (32, 160, [0, 0, 128, 128, 0]),  # pages of the group are longer than the kernels' chunks
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("checkpoints")

    def make(family: str, **overrides: Any) -> Path:
        directory = root / f"{family}-{len(overrides)}"
        return directory if directory.exists() else make_checkpoint(family, directory, **overrides)

    return make


def serve_and_check(
    processes: Fresh, model: Path, tp: int, dcp: int, *flags: str
) -> tuple[Report, ...]:
    """Serve the batches, check every answer on every rank, and what the cache had of them."""
    page, chunk, cached = LAYOUTS[dcp]
    # Not a multiple of what chunks are cut to: whole pages of the group, and 64 tokens.
    flags += ("--page-size", str(page), "--chunked-prefill-size", str(chunk))
    flags += ("--max-total-tokens", str(ROWS))
    reports = serve(processes, model, tp, flags, BATCHES, NEW_TOKENS, retracting=True)
    for report in reports:
        check_all(model, BATCHES, report.answers, NEW_TOKENS)
        hits = [answers[0].cached_tokens for answers in report.answers]
        assert hits == ([0] * 5 if "--disable-radix-cache" in flags else cached)
        assert report.kv_tokens // dcp == ROWS // page * page
    return tuple(reports)


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_plain_tp_equals_transformers(fresh: Fresh, checkpoint: Any, family: str) -> None:
    serve_and_check(fresh, checkpoint(family), 2, 1)


ONE_HEAD = {"num_key_value_heads": 1}


def text(family: str, **overrides: Any) -> dict[str, Any]:
    """Overrides of a model that reads pictures too."""
    return {"text_config": {**FAMILIES[family].config["text_config"], **overrides}}


# GQA with two key-value heads needs two shards of heads, or gates beside queries would not fit.
CASES = [
    ("qwen3_next", 4, 2, "a2a", {}),
    ("qwen3_next", 4, 4, "ag_rs", ONE_HEAD),
    ("qwen3_5", 2, 2, "a2a", ONE_HEAD),
    ("qwen3_5_moe", 2, 2, "ag_rs", ONE_HEAD),
    ("qwen3_5_vl", 2, 2, "ag_rs", text("qwen3_5_vl", **ONE_HEAD)),
    ("qwen3_5_moe_vl", 2, 2, "a2a", text("qwen3_5_moe_vl", **ONE_HEAD)),
    ("kimi_linear", 2, 2, "ag_rs", {}),
    ("kimi_linear", 4, 4, "queries replicated", {}),
    ("bailing_hybrid", 2, 2, "a2a", {}),
    ("bailing_hybrid", 4, 2, "queries replicated", {}),
    ("nemotron_h", 4, 2, "a2a", {}),
    ("granitemoehybrid", 2, 2, "ag_rs", ONE_HEAD),
    ("falcon_h1", 2, 2, "a2a", ONE_HEAD),
    ("lfm2", 4, 4, "a2a", ONE_HEAD),
    ("lfm2_moe", 2, 2, "a2a", ONE_HEAD),
]
#: Numbers in a cached row of one layer and rank: the latent, or one head's K and V.
WIDTHS = {
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), 512 + 64),
    "granitemoehybrid": 2 * 16,
    **dict.fromkeys(("lfm2", "lfm2_moe"), 2 * 16),
}


@pytest.mark.parametrize(("family", "tp", "dcp", "backend", "overrides"), CASES)
def test_sharded_equals_transformers(
    ready: Fresh,
    checkpoint: Any,
    family: str,
    tp: int,
    dcp: int,
    backend: str,
    overrides: dict[str, Any],
) -> None:
    model = checkpoint(family, **overrides)
    layout: tuple[str, ...] = ("--dcp-size", str(dcp), "--dcp-comm-backend", backend)
    if backend == "queries replicated":
        layout = ("--attn-tp-size", str(tp // dcp))
    if family.startswith("lfm2"):  # SGLang takes no snapshots of its states
        layout += ("--disable-radix-cache",)
    (report, *_) = serve_and_check(ready, model, tp, dcp, *layout)
    # Two layers keep a cache, whatever the others; a page of it is not used.
    rows = report.kv_tokens // dcp + LAYOUTS[dcp][0]
    assert report.kv_bytes == rows * 2 * WIDTHS.get(family, 2 * 32) * 4


# Kernels of MLA exist for the widths of real models.
WIDE = {"qk_nope_head_dim": 128, "v_head_dim": 128}
KERNELS = {"qwen3_next": ONE_HEAD, "kimi_linear": WIDE, "bailing_hybrid": WIDE}


# FlashInfer's plans of MLA take the softmax scale from the configuration, not from the layers.
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("qwen3_next", "fa3"),
        ("kimi_linear", "fa3"),
        ("kimi_linear", "flashinfer"),
        ("bailing_hybrid", "flashinfer"),
    ],
)
def test_the_kernels_of_the_user_serve_the_full_layers(
    kernels: Fresh, checkpoint: Any, family: str, attention: str
) -> None:
    flags = ("--dcp-size", "2", "--attention-backend", attention)
    serve_and_check(kernels, checkpoint(family, **KERNELS[family]), 2, 2, *flags)


@pytest.mark.parametrize("lost", [0, 4])
def test_a_lost_page_of_the_cache_is_seen_beside_states(lost: int) -> None:
    tree = SimpleNamespace(full_evictable_size=lambda: 8, full_protected_size=lambda: 4)
    allocator = SimpleNamespace(size=66, page_size=4, available_size=lambda: 52 - lost)
    checker = SimpleNamespace(
        is_hybrid_swa=False,
        is_hybrid_ssm=True,
        tree_cache=tree,
        token_to_kv_pool_allocator=allocator,
        pool_stats_observer=SimpleNamespace(session_held_tokens=lambda: 0),
    )
    leak, message = check_full_pool(lambda *_: (False, "upstream's"), checker, None)
    assert leak == bool(lost)
    assert "slots=64" in message


def small_pool(
    rank: int, argv: list[str], prompts: list[list[int]], longer: list[int], new_tokens: int
) -> tuple[list[Answer], Answer]:
    """In a rank's process: prompts of which admission expects too little, and one with a prefix."""
    logging.basicConfig(level=logging.INFO)
    scheduler = scheduler_of(rank, argv)
    scheduler.get_init_info()  # says what the pools take
    expect_few_tokens()
    answers = answer(scheduler, prompts, new_tokens)
    answer(scheduler, [FIRST], 1)
    (again,) = answer(scheduler, [longer], new_tokens)
    scheduler.flush_cache()
    scheduler.on_idle()  # with nothing cached
    return answers, again


def test_a_small_pool_retracts_resumes_and_says_what_states_take(
    ready: Fresh, checkpoint: Any
) -> None:
    """Eight requests that cannot all be held: some are retracted, and still answer the same."""
    model, new_tokens = checkpoint("qwen3_next", **ONE_HEAD), 48
    flags = ("--max-total-tokens", "128", "--page-size", "1", "--schedule-conservativeness", "0.05")
    flags += ("--dcp-size", "2", "--max-mamba-cache-size", "40")
    prompts = [prompt(20, seed=seed) for seed in range(10, 18)]
    longer = FIRST + prompt(5, seed=1)
    given = (command_line(model, 2, *flags), prompts, longer, new_tokens)
    for outcome in ready.outcomes([(small_pool, rank, *given) for rank in range(2)]):
        assert outcome.status == 0, outcome.output
        assert "Recurrent states: 40 in " in outcome.output
        assert "Retract requests" in outcome.output
        answers, again = outcome.value
        assert sum(answered.retractions for answered in answers)
        check_all(model, [[*prompts, longer]], [[*answers, again]], new_tokens)
        assert again.cached_tokens == 192
