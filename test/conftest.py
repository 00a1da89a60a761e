"""How the tests run: servers forked, and in several processes where the machine has room.

Its presence puts this folder on sys.path: tests import helpers as ``srt.distributed.ranks``.
"""

import os
from pathlib import Path

import psutil
import pytest
from sglang_cpu_reference import warm
from sglang_cpu_reference.server import Server
from srt.fresh import source

# What a process of tests takes with its servers and ranks, GiB.
MEMORY_OF_A_WORKER = 9


def pytest_configure() -> None:
    # The tests of the platform itself start the command (`cold`).
    Server.forks = True
    warm.make = source


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: none beside this process where a GPU is to be shared or timed."""
    if Path("/dev/nvidia0").exists():
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(cores, psutil.virtual_memory().total // (MEMORY_OF_A_WORKER << 30))
