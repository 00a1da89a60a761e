"""SGLang on a CPU: a platform plugin of plain torch operations, and what is needed to try it.

This module imports nothing of SGLang: SGLang imports it while its own platforms are half built.
"""

import os

from sglang_cpu_reference import forkserver

#: The name that ``SGLANG_PLATFORM`` selects; also the entry points' name in pyproject.toml.
PLATFORM_NAME = "cpu_reference"


def selected() -> bool:
    """Whether the user chose this platform."""
    return os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


def activate() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the class to use, or None when not selected."""
    if not selected():
        return None
    # Read when torch is imported, so set here, for every child to inherit. Ranks share the cores:
    # torch's default of a thread per core in each of them only makes them wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # SGLang compiles a few small functions even in eager mode; that takes longer than the model.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    forkserver.start_early()
    return f"{__name__}.platform.CpuReferencePlatform"
