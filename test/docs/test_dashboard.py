"""The panel of the series' metrics that is handed out."""

import json
import re
from pathlib import Path

import pytest
from sglang_helix.srt.observability.metrics_collector import BATCHES, LAYOUT, ROWS, WAITS, Metrics
from srt.metered import metered_scheduler

pytestmark = pytest.mark.quick

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"


def test_it_shows_every_metric_by_labels_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Grafana's import asks for: title, uid, version of the schema, panels of known types."""
    board = json.loads(DASHBOARD.read_text())
    assert board["uid"]
    assert board["title"]
    assert board["schemaVersion"] >= 36
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    queries = [target for panel in board["panels"] for target in panel["targets"]]
    text = json.dumps([query["expr"] for query in queries])
    assert {LAYOUT, ROWS, f"{BATCHES}_total", WAITS} == set(re.findall(r"sglang_helix:\w+", text))
    assert "tp_rank=" not in text  # each replica of attention has other ranks
    assert {panel["type"] for panel in board["panels"]} <= {"table", "timeseries"}
    scheduler = metered_scheduler(monkeypatch)
    Metrics(scheduler)
    named = {"instance"}
    for family in scheduler.registry.collect():
        for sample in family.samples:
            named |= set(sample.labels)
    for query in queries:
        assert set(re.findall(r"{{(\w+)}}", query["legendFormat"])) <= named | {"exchange"}
