"""Fixtures shared by the tests of several folders."""

from collections.abc import Iterator

import pytest
from srt.fresh import Fresh


@pytest.fixture(scope="session")
def fresh() -> Iterator[Fresh]:
    """New SGLang processes on the CPU reference platform."""
    with Fresh("cpu_reference") as process:
        yield process
