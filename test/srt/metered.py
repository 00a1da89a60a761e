"""A scheduler with as much as the series' metrics ask of one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from sglang_helix.srt.observability import metrics_collector


def metered_scheduler(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A scheduler of rank 3 of 4, two a group, with a pool of 40 slots and its own registry."""
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    for name in ("Counter", "Gauge"):
        made = getattr(prometheus_client, name)

        def make(*args: Any, made: Any = made, **kwargs: Any) -> Any:
            return made(*args, registry=registry, **kwargs)

        monkeypatch.setattr(prometheus_client, name, make)
    group = SimpleNamespace(unique_name="dcp", world_size=2)
    group.exchanger = Exchanger("symm", group)
    parallel = SimpleNamespace(
        attn_tp_size=4, attn_dcp_size=2, attn_tp_rank=3, dcp_comm_backend="symm", dcp_group=group
    )
    monkeypatch.setattr(metrics_collector, "get_parallel", lambda: parallel)
    no_drafts = SimpleNamespace(speculative_num_draft_tokens=None)
    monkeypatch.setattr(metrics_collector, "get_spec", lambda: no_drafts)
    group.exchanger._kernels = {
        (8, 16, torch.bfloat16): SimpleNamespace(max_tokens=8, slow_seconds={0: 3.0, -1: 1.0}),
        (8, 64, torch.bfloat16): SimpleNamespace(max_tokens=4, slow_seconds={0: 1.0}),
    }
    runner = SimpleNamespace(use_mla_backend=False, model_config=SimpleNamespace(v_head_dim=16))
    return SimpleNamespace(
        registry=registry,
        metrics_collector=SimpleNamespace(labels={"tp_rank": 3}),
        token_to_kv_pool_allocator=SimpleNamespace(size=41, page_size=2, available_size=lambda: 20),
        tree_cache=SimpleNamespace(evictable_size=lambda: 6, protected_size=lambda: 2),
        is_hybrid_ssm=False,
        is_hybrid_swa=False,
        server_args=SimpleNamespace(),
        tp_worker=SimpleNamespace(model_runner=runner),
    )
