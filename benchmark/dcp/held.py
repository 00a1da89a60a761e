"""`sglang.launch_server` that waits before its process groups until a file is there.

For `serve --together`, whose launcher this is: a server that waits has imported all it needs and
holds no GPU memory.
"""

from __future__ import annotations

import os
import runpy
import time
from typing import Any

from benchmark.dcp import made

# Environment: the file to wait for, and "1" where contexts are `made`.
FILE, MADE = "HELIX_BENCHMARK_HOLD", "HELIX_BENCHMARK_MADE"


def wait(*args: Any, **kwargs: Any) -> None:
    """Before `init_parallel_runtime`, in every rank."""
    while not os.path.exists(os.environ[FILE]):
        time.sleep(0.1)


def register() -> None:
    """Hand the hooks to SGLang, which applies them when it loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if os.environ[MADE] == "1":
        made.register()
    target = "sglang.srt.distributed.bootstrap.init_parallel_runtime"
    HookRegistry.register(target, wait, HookType.BEFORE)


# Schedulers are spawned, and spawning runs the main module again under this name.
if __name__ == "__mp_main__":
    register()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
