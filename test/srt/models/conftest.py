"""Fixtures of the tests of whole models."""

from collections.abc import Iterator

import pytest
from srt.fresh import Fresh


@pytest.fixture(scope="session")
def ready() -> Iterator[Fresh]:
    """Ranks of a sharded cache, their hooks installed, about to resolve their arguments."""
    with Fresh("cpu_reference", timeout=120, preload=("srt.models.preload",)) as process:
        yield process
