"""What every rank of a sharded cache does first, done once: import this before ranks are forked.

SGLang looks through every loaded module for what a hook replaces, which takes a second for each of
the two stages, and its first garbage collection takes another.
"""

import gc

from sglang.srt.plugins import load_plugins
from sglang_helix.plugin import install_serve_stage

load_plugins()
install_serve_stage()
gc.freeze()
