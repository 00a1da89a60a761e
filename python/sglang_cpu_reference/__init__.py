"""SGLang on a CPU: a platform plugin of plain torch operations, and what is needed to try it.

This module imports nothing of SGLang: SGLang imports it while its own platforms are half built.
"""

import os

#: The name that ``SGLANG_PLATFORM`` selects; also the entry points' name in pyproject.toml.
PLATFORM_NAME = "cpu_reference"


def selected() -> bool:
    """Whether the user chose this platform."""
    return os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


def activate() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the class to use, or None when not selected."""
    if not selected():
        return None
    # Ranks share the cores; torch's default of one thread per core in each of them only makes
    # them wait for one another. Set here because every child inherits it before importing torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return f"{__name__}.platform.CpuReferencePlatform"
