"""Fixtures of the tests of verdicts: models, and processes to resolve their arguments in."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from srt.compatibility.situations import CONFIGS
from srt.fresh import Fresh
from srt.resolved import SMALL

PUBLISHED = Path(__file__).parents[3] / "docs/models"


@pytest.fixture(scope="session")
def models(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Beside the checkpoints, models that are a configuration alone."""
    root = tmp_path_factory.mktemp("models")
    found = {**models, "kimi_k3": str(PUBLISHED / "Kimi-K3")}
    for name, config in CONFIGS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({**SMALL, **config}))
        found[name] = str(root / name)
    return found


@pytest.fixture(scope="session")
def gpu() -> Iterator[Fresh]:
    """New processes that believe in no platform plugin."""
    with Fresh(timeout=180) as process:
        yield process
