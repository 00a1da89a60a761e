"""What every rank does first, done once: import this before ranks are forked.

SGLang looks through every loaded module for what a hook replaces, which takes a second for the
hooks of each stage, and a rank's first garbage collection takes another. What a scheduler imports
as it is built takes a tenth.
"""

import gc
from importlib import import_module

from sglang.srt.plugins import load_plugins

load_plugins()
for _name in (
    "arg_groups.pipeline",
    "constrained.xgrammar_backend",
    "distributed.device_communicators.custom_all_reduce",
    "distributed.device_communicators.pymscclpp",
    "distributed.device_communicators.shm_broadcast",
    "mem_cache.rust_tree_core.adapter",
):
    import_module(f"sglang.srt.{_name}")
gc.freeze()
