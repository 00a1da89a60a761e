"""Latents that have left device and host come back from Mooncake's store, or its stand-in."""

import json
from pathlib import Path

from sglang_cpu_reference.checkpoints import make_checkpoint
from srt.expected import check, prompt
from srt.fresh import Fresh
from srt.models.serving import Answer, answer, command_line, scheduler_of

NEW_TOKENS = 4
RANKS, SHARDS, PAGE = 4, 2, 4
PROMPTS = [prompt(4 * SHARDS * PAGE + 3), prompt(2 * SHARDS * PAGE + 1)]


def asked_twice(rank: int, argv: list[str]) -> list[list[Answer]]:
    """In a rank's process: answers, and those when device and host have nothing left."""
    scheduler = scheduler_of(rank, argv)
    first = answer(scheduler, PROMPTS, NEW_TOKENS)
    assert scheduler.flush_cache()
    return [first, answer(scheduler, PROMPTS, NEW_TOKENS)]


def test_prefixes_come_back_from_the_store(ready: Fresh, tmp_path: Path) -> None:
    """Both groups of two ranks read what the first one has written: a share of each rank."""
    model, store = make_checkpoint("deepseek_v2", tmp_path / "model"), tmp_path / "store"
    config = {"master_server_address": str(store), "prefetch_threshold": PAGE}
    flags = (
        *("--dcp-size", str(SHARDS), "--dcp-comm-backend", "a2a", "--page-size", str(PAGE)),
        *("--max-total-tokens", "128", "--enable-hierarchical-cache", "--hicache-ratio", "2"),
        *("--hicache-write-policy", "write_through", "--hicache-mem-layout", "page_first_direct"),
        *("--hicache-storage-backend", "mooncake", "--hicache-storage-prefetch-policy"),
        *("wait_complete", "--hicache-storage-backend-extra-config", json.dumps(config)),
        *("--served-model-name", "latents"),
    )
    pages = [len(tokens) // (SHARDS * PAGE) for tokens in PROMPTS]
    for of_rank in ready.ranks(asked_twice, RANKS, command_line(model, RANKS, *flags)):
        for answers, hits in zip(of_rank, ([0, 0], pages), strict=True):
            assert [got.cached_tokens // (SHARDS * PAGE) for got in answers] == hits
            for tokens, got in zip(PROMPTS, answers, strict=True):
                check(model, tokens, got, NEW_TOKENS)
    keys = [key for key in (store / "keys").read_text().split() if "warmup" not in key]
    # Whose they are: model, dtype and memory layout, layout of the ranks, and the rank's share.
    kind = f"latents-float32-page_first_direct_tp{RANKS}_dcp{SHARDS}_page{SHARDS * PAGE}_pp1_cp1_"
    assert all(key.startswith(kind) for key in keys)
    for place in range(SHARDS):
        assert sum(key.endswith(f"_dcp{place}_cp0_k") for key in keys) == sum(pages)
