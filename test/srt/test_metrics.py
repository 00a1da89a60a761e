"""The series' metrics: what they say of batches and waits."""

from types import SimpleNamespace

import pytest
from sglang_helix.srt.models.value_switch import Switch
from sglang_helix.srt.observability import metrics_collector
from sglang_helix.srt.observability.metrics_collector import BATCHES, LAYOUT, ROWS, WAITS, Metrics
from srt.metered import metered_scheduler

pytestmark = pytest.mark.quick


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return metered_scheduler(monkeypatch)


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
        ("IDLE", None, None, 0, False, None),
        ("PREBUILT", None, None, 4, False, None),
    ],
)
def test_batches_are_counted_by_what_they_exchange(
    scheduler: SimpleNamespace,
    mode: str,
    prefixes: list[int] | None,
    chunks: list[int] | None,
    requests: int,
    mla: bool,
    kind: str | None,
) -> None:
    """Those that nothing is computed for are not: of an idle replica, of what was transferred."""
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
    counted = {
        sample.labels["exchange"]: sample.value
        for family in scheduler.registry.collect()
        for sample in family.samples
        if sample.name == f"{BATCHES}_total"
    }
    assert counted == ({kind: 1} if kind else {})


@pytest.mark.parametrize(("from_tokens", "kind"), [(5, "symm"), (6, "a2a")])
def test_values_projected_first_are_exchanged_in_larger_batches(
    scheduler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, from_tokens: int, kind: str
) -> None:
    """Symm takes 4 tokens of the wider heads here, and 8 of the narrow ones."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    monkeypatch.setattr(metrics_collector, "replicates_v_proj", lambda args: True)
    monkeypatch.setattr(metrics_collector, "switch", lambda: Switch(from_tokens, None))
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=lambda: 5)
    assert Metrics(scheduler)._exchange_of(batch) == kind
