"""What a rank says of its layout as it starts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.managers.scheduler import describe

pytestmark = pytest.mark.quick


def said(
    monkeypatch: pytest.MonkeyPatch, *, mla: bool, replicas: int = 1, **report: int
) -> list[str]:
    """Rank 3 of 4, in pairs that share 8 query heads on 2 key-value heads, or on a latent."""
    ranks = 4 // replicas
    parallel = SimpleNamespace(
        tp_size=4,
        tp_rank=3,
        attn_dp_size=replicas,
        attn_tp_rank=3 % ranks,
        world_group=SimpleNamespace(world_size=4, rank=3),
        dcp_group=SimpleNamespace(ranks=[2, 3]),
    )
    model = SimpleNamespace(
        get_max_num_attention_heads=lambda: 8,
        get_total_num_kv_heads=lambda: 2,
        hf_text_config=None,
    )
    runner: Any = SimpleNamespace(
        model_config=model,
        use_mla_backend=mla,
        req_to_token_pool=None,
        server_args=None,
        is_hybrid_swa=False,
    )
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return describe(Layout(ranks, 2), runner, {"kv_tokens": 4096, "kv_bytes": 3 * 2**29, **report})


@pytest.mark.parametrize(("mla", "held"), [(False, "1 of 2 K/V"), (True, "the latent")])
def test_sizes_groups_heads_and_capacity(
    monkeypatch: pytest.MonkeyPatch, mla: bool, held: str
) -> None:
    assert said(monkeypatch, mla=mla) == [
        "Layout: N = 4 ranks; attention on A = 2 head shards, each of K = 2 ranks that split the "
        "sequence; FFN on all N",
        "Rank 3: head shard 1, place 1; KVP group [2, 3], attention TP group [1, 3]",
        f"Heads: attends 4 query heads of 8 over its tokens, ends with 2; caches {held}",
        "KV cache: 4096 tokens in 1.50 GiB of each rank; plain TP would hold 2048",
    ]


def test_ranks_are_those_of_an_attention_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, mla=True, replicas=2) == [
        "Layout: N = 2 ranks of each of 2 attention replicas; attention on A = 1 head shards, each "
        "of K = 2 ranks that split the sequence; FFN on all 4",
        "Rank 3: head shard 0, place 1; KVP group [2, 3], attention TP group [3]",
        "Heads: attends 8 query heads of 8 over its tokens, ends with 4; caches the latent",
        "KV cache: 4096 tokens in 1.50 GiB of each rank; plain TP would hold 2048",
    ]


def test_a_drafts_cache_is_named_beside_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    without = said(monkeypatch, mla=True)
    assert said(monkeypatch, mla=True, draft_kv_bytes=2**28) == [
        *without,
        "Draft model: a cache of all these tokens, 0.25 GiB of each rank",
    ]
