"""The panel of the series' metrics that is handed out."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from sglang_helix.srt.observability.metrics_collector import BATCHES, LAYOUT, ROWS, WAITS, Metrics
from srt.metered import metered_scheduler

pytestmark = pytest.mark.quick

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"


def record(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON schema of an object with these fields and no other."""
    return {
        "type": "object",
        "required": list(required),
        "properties": required | (optional or {}),
        "additionalProperties": False,
    }


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
SOURCE = record({"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}})
OPTIONS = {
    "table": record({"frameIndex": WHOLE, "showHeader": FLAG}),
    "timeseries": record(
        {
            "legend": record(
                {
                    "calcs": {"type": "array", "items": TEXT},
                    "displayMode": {"enum": ["list", "table"]},
                    "placement": {"enum": ["bottom", "right"]},
                    "showLegend": FLAG,
                }
            ),
            "tooltip": record(
                {
                    "mode": {"enum": ["single", "multi", "none"]},
                    "sort": {"enum": ["asc", "desc", "none"]},
                }
            ),
        }
    ),
}
#: Of a dashboard, what is used here, as Grafana 13.2 describes it in its package `@grafana/schema`
#: 13.2.3, whose types the file passes; besides what Grafana refuses to save: an empty title, an uid
#: of other characters or more than 40, an earlier dashboard's number (`id`).
SCHEMA = record(
    {
        "title": {**TEXT, "pattern": r"\S"},
        "uid": {**TEXT, "pattern": "^[a-zA-Z0-9_-]{1,40}$"},
        "schemaVersion": {**WHOLE, "minimum": 36, "maximum": 42},
        "panels": {
            "type": "array",
            "items": {
                "oneOf": [
                    record(
                        {
                            "id": WHOLE,
                            "title": TEXT,
                            "description": TEXT,
                            "type": {"const": kind},
                            "datasource": SOURCE,
                            "gridPos": record(dict.fromkeys("hwxy", WHOLE)),
                            "fieldConfig": record(
                                {
                                    "defaults": record({"unit": TEXT, "min": WHOLE}),
                                    "overrides": {"type": "array", "maxItems": 0},
                                }
                            ),
                            "options": options,
                            "targets": {
                                "type": "array",
                                "items": record(
                                    {
                                        "refId": TEXT,
                                        "expr": TEXT,
                                        "legendFormat": TEXT,
                                        "datasource": SOURCE,
                                    },
                                    {"format": {"const": "table"}, "instant": FLAG},
                                ),
                            },
                        }
                    )
                    for kind, options in OPTIONS.items()
                ]
            },
        },
        "templating": record(
            {
                "list": {
                    "type": "array",
                    "items": record(
                        {"name": TEXT, "type": {"enum": ["datasource", "query"]}},
                        {
                            "label": TEXT,
                            "query": {"type": ["string", "object"]},
                            "datasource": SOURCE,
                            "hide": {"enum": [0, 1, 2]},
                            "refresh": {"enum": [0, 1, 2]},
                            "includeAll": FLAG,
                            "multi": FLAG,
                            "current": record({"text": {}, "value": {}}),
                        },
                    ),
                }
            }
        ),
    },
    {
        "version": WHOLE,
        "editable": FLAG,
        "tags": {"type": "array", "items": TEXT},
        "refresh": {**TEXT, "pattern": "^[1-9][0-9]+s$"},
        "time": record({"from": TEXT, "to": TEXT}),
    },
)


def test_grafana_can_import_it() -> None:
    board = json.loads(DASHBOARD.read_text())
    jsonschema.validate(board, SCHEMA)
    variables = {variable["name"]: variable["type"] for variable in board["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board))) == {*variables, "__all"}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered = set[tuple[int, int]]()
    for panel in panels:
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        h, w, x, y = (panel["gridPos"][name] for name in "hwxy")
        cells = set(product(range(x, x + w), range(y, y + h)))
        assert x + w <= 24
        assert not cells & covered
        covered |= cells


def test_it_shows_every_metric_by_labels_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    board = json.loads(DASHBOARD.read_text())
    queries = [target for panel in board["panels"] for target in panel["targets"]]
    text = json.dumps([query["expr"] for query in queries])
    assert {LAYOUT, ROWS, f"{BATCHES}_total", WAITS} == set(re.findall(r"sglang_helix:\w+", text))
    assert "tp_rank=" not in text  # each replica of attention has other ranks
    scheduler = metered_scheduler(monkeypatch)
    Metrics(scheduler)
    named = {"instance"}
    for family in scheduler.registry.collect():
        for sample in family.samples:
            named |= set(sample.labels)
    for query in queries:
        assert set(re.findall(r"{{(\w+)}}", query["legendFormat"])) <= named | {"exchange"}
