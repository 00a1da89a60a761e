"""Fixtures shared by the tests of several folders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from srt.fresh import Fresh

if TYPE_CHECKING:
    from srt.resolved import Resolve


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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints by family, of GQA and of MLA."""
    from sglang_cpu_reference.checkpoints import make_checkpoint
    from srt.resolved import WORKING

    root = tmp_path_factory.mktemp("models")
    return {family: str(make_checkpoint(family, root / family)) for family in WORKING}


@pytest.fixture(scope="session")
def resolved(models: dict[str, str]) -> Iterator[Resolve]:
    """``resolved(machine, family or directory, tp_size=..., ...)``, see `srt.resolved`."""
    from srt.resolved import resolve

    with Fresh(preload=("srt.models.plugins_loaded",)) as process:
        yield lambda machine, model, launched=False, **flags: process.here(
            resolve, machine, models.get(model, model), flags, launched
        )
