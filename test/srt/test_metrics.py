"""The series' metrics: what they say of batches and waits, and the panel that shows them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_helix.srt.layers.dcp import exchange
from sglang_helix.srt.observability import metrics_collector
from sglang_helix.srt.observability.metrics_collector import BATCHES, LAYOUT, ROWS, WAITS, Metrics

pytestmark = pytest.mark.quick

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"
GROUP = SimpleNamespace(unique_name="dcp", world_size=2)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A scheduler of rank 3 of 4, two a group, with a pool of 40 slots and its own registry."""
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    for name in ("Counter", "Gauge"):
        made = getattr(prometheus_client, name)

        def make(*args: Any, made: Any = made, **kwargs: Any) -> Any:
            return made(*args, registry=registry, **kwargs)

        monkeypatch.setattr(prometheus_client, name, make)
    parallel = SimpleNamespace(
        tp_size=4, attn_dcp_size=2, tp_rank=3, dcp_comm_backend="symm", dcp_group=GROUP
    )
    monkeypatch.setattr(metrics_collector, "get_parallel", lambda: parallel)
    no_drafts = SimpleNamespace(speculative_num_draft_tokens=None)
    monkeypatch.setattr(metrics_collector, "get_spec", lambda: no_drafts)
    kernels = [
        SimpleNamespace(max_tokens=8, slow_seconds={0: 3.0, -1: 1.0}),
        SimpleNamespace(max_tokens=4, slow_seconds={0: 1.0}),
    ]
    monkeypatch.setattr(exchange, "_prepared", {"dcp": dict(enumerate(kernels))})
    return SimpleNamespace(
        registry=registry,
        metrics_collector=SimpleNamespace(labels={"tp_rank": 3}),
        token_to_kv_pool_allocator=SimpleNamespace(size=41, page_size=2, available_size=lambda: 20),
        tree_cache=SimpleNamespace(evictable_size=lambda: 6, protected_size=lambda: 2),
        is_hybrid_ssm=False,
        is_hybrid_swa=False,
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(use_mla_backend=False)),
    )


def test_layout_rows_and_waits(scheduler: SimpleNamespace) -> None:
    Metrics(scheduler)
    value = scheduler.registry.get_sample_value
    shape = {"attn_tp_size": "2", "dcp_size": "2", "attn_shard": "1", "dcp_rank": "1"}
    assert value(LAYOUT, {"tp_rank": "3", **shape, "dcp_comm_backend": "symm"}) == 1
    for state, rows in (("used", 7), ("cached", 3), ("free", 10)):
        assert value(ROWS, {"tp_rank": "3", "state": state}) == rows
    for peer, seconds in ((0, 4.0), (1, 0.0)):
        assert value(WAITS, {"tp_rank": "3", "peer": str(peer)}) == seconds


@pytest.mark.parametrize(
    ("mode", "prefixes", "chunks", "requests", "mla", "kind"),
    [
        ("EXTEND", [0, 0], [9, 9], 2, False, "none"),
        # As many tokens as symm takes, and one more, of those that have a prefix or lie between.
        ("EXTEND", [0, 5, 0, 5, 0], [9, 1, 2, 1, 9], 5, False, "symm"),
        ("EXTEND", [0, 5, 0, 5, 0], [0, 1, 3, 1, 0], 5, False, "a2a"),
        ("EXTEND", [0, 5], [1, 1], 2, True, "gather"),
        ("DECODE", None, None, 4, False, "symm"),
        ("DECODE", None, None, 5, False, "a2a"),
        ("IDLE", None, None, 0, False, "none"),
    ],
)
def test_batches_are_counted_by_what_they_exchange(
    scheduler: SimpleNamespace,
    mode: str,
    prefixes: list[int] | None,
    chunks: list[int] | None,
    requests: int,
    mla: bool,
    kind: str,
) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    scheduler.tp_worker.model_runner.use_mla_backend = mla
    batch = SimpleNamespace(
        forward_mode=ForwardMode[mode],
        prefix_lens=prefixes,
        extend_lens=chunks,
        batch_size=lambda: requests,
    )
    scheduler.helix_metrics = Metrics(scheduler)
    metrics_collector.count_batch(None, scheduler, batch, None)
    labels = {"tp_rank": "3", "exchange": kind}
    assert scheduler.registry.get_sample_value(f"{BATCHES}_total", labels) == 1


def test_the_panel_shows_every_metric_by_labels_that_it_has(scheduler: SimpleNamespace) -> None:
    """What Grafana's import asks for: title, uid, version of the schema, panels of known types."""
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"]
    assert board["title"]
    assert board["schemaVersion"] >= 36
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    queries = [target for panel in board["panels"] for target in panel["targets"]]
    text = json.dumps([query["expr"] for query in queries])
    assert {LAYOUT, ROWS, f"{BATCHES}_total", WAITS} == set(re.findall(r"sglang_helix:\w+", text))
    assert {panel["type"] for panel in board["panels"]} <= {"table", "timeseries"}
    scheduler.helix_metrics = Metrics(scheduler)
    named = {"instance"}
    for family in scheduler.registry.collect():
        for sample in family.samples:
            named |= set(sample.labels)
    for query in queries:
        assert set(re.findall(r"{{(\w+)}}", query["legendFormat"])) <= named | {"exchange"}
