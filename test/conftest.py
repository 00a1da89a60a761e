"""How the tests run: servers forked, the dearest files first, in as many processes as have room.

Its presence puts this folder on sys.path: tests import helpers as ``srt.distributed.ranks``.
"""

import os
import sys
from pathlib import Path

import psutil
import pytest
from sglang_cpu_reference import warm
from sglang_cpu_reference.server import Server
from srt.fresh import source

# What a process of tests takes with its servers and ranks, GiB.
MEMORY_OF_A_WORKER = 9

# The files that take longest, by CPU time. They come first, so that no process of tests is left
# with one of them while the others have nothing more to do.
DEAREST = (
    "srt/test_real_model.py",
    "srt/test_end_to_end.py",
    "srt/models/test_models.py",
    "srt/layers/attention/test_conformance.py",
    "srt/export/test_served.py",
    "srt/test_features.py",
    "srt/speculative/test_drafts.py",
    "srt/models/test_adapters.py",
    "srt/layers/dcp/test_symm_exchange.py",
    "srt/benchmark/test_serve_cli.py",
    "srt/test_cpu_reference.py",
    "srt/models/test_windows.py",
    "srt/models/test_hybrid.py",
    "srt/distributed/test_all_to_all.py",
    "srt/disaggregation/test_router.py",
    "srt/mem_cache/test_hierarchical_cache.py",
    "srt/speculative/test_ngram.py",
)


def pytest_configure() -> None:
    # As in an activated environment, which the scripts of examples/ are for: they call `python`.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # The tests of the platform itself start the command (`cold`).
    Server.forks = True
    warm.make = source


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The dearest files first; otherwise in their order."""
    first = {Path(__file__).parent / name: place for place, name in enumerate(DEAREST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: none beside this process where a GPU is to be shared or timed."""
    if Path("/dev/nvidia0").exists():
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(cores, psutil.virtual_memory().total // (MEMORY_OF_A_WORKER << 30))
