"""Fixtures of the conformance suite."""

import pytest
from srt.fresh import Fresh


@pytest.fixture
def process(request: pytest.FixtureRequest, backend: str) -> Fresh:
    """Where the kernels of a backend run on a CPU: stand-ins, or Triton's own interpreted."""
    found: Fresh = request.getfixturevalue("interpreted" if backend == "triton" else "kernels")
    return found
