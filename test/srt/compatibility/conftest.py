"""Fixtures of the tests of verdicts: models, and processes to resolve their arguments in."""

import json
from collections.abc import Iterator

import pytest
from srt.compatibility.situations import CONFIGS
from srt.fresh import Fresh
from srt.resolved import SMALL


@pytest.fixture(scope="session")
def models(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Beside the checkpoints, models that are a configuration alone."""
    root = tmp_path_factory.mktemp("models")
    found = dict(models)
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
