"""``python -m srt.poison``: a server whose page 0 is NaN before every pass. For tests.

SGLang never allocates that page, and padded requests of a captured graph read it: what a kernel
takes from there must reach no other request. Ranks may share a GPU, see `share_gpu`.
"""

import os
import runpy
from typing import Any

from srt import share_gpu

# The series itself hooks `forward`, and a target is hooked once.
TARGET = "sglang.srt.model_executor.model_runner.ModelRunner._forward_raw"
SAID = "page 0 of the target's cache is NaN"


def poison(runner: Any, *args: Any, **kwargs: Any) -> None:
    """Before `TARGET`, in every rank; a draft's cache stays as it is."""
    if runner.is_draft_worker:
        return
    pool = runner.token_to_kv_pool
    latent = hasattr(pool, "kv_buffer")
    for buffer in pool.kv_buffer if latent else (*pool.k_buffer, *pool.v_buffer):
        buffer[: pool.page_size] = float("nan")
    if not hasattr(runner, "_poisoned"):
        runner._poisoned = True
        print(SAID, flush=True)


def register() -> None:
    """Hand the hook to SGLang, which applies it when it loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, poison, HookType.BEFORE)


# Schedulers are spawned, and spawning runs the main module again under this name.
if __name__ == "__mp_main__":
    register()
sharing = share_gpu.ENVIRONMENT.items() <= os.environ.items()
if sharing and __name__ in ("__main__", "__mp_main__"):
    share_gpu.share()
if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
