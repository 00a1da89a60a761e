"""Fixtures shared by the tests of several folders."""

from collections.abc import Iterator

import pytest
from srt.fresh import Fresh


@pytest.fixture(scope="session")
def fresh() -> Iterator[Fresh]:
    """New SGLang processes on the CPU reference platform."""
    with Fresh("cpu_reference") as process:
        yield process


@pytest.fixture(scope="session")
def ready() -> Iterator[Fresh]:
    """Processes that have installed the series already, to be ranks of a sharded cache."""
    with Fresh("cpu_reference", preload=("srt.models.series_installed",)) as process:
        yield process


@pytest.fixture(scope="session")
def kernels() -> Iterator[Fresh]:
    """As `ready`, with stand-ins for every GPU kernel that has one."""
    preload = ("srt.models.stand_ins_installed", "srt.models.series_installed")
    with Fresh("cpu_reference", preload=preload) as process:
        yield process


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Fresh]:
    """As `ready`, with Triton's kernels in its interpreter."""
    preload = ("srt.models.series_installed",)
    with Fresh("cpu_reference", 500, preload, interpreted=True) as process:
        yield process
