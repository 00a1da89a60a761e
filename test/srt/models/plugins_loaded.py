"""What every rank does first, done once: import this before ranks are forked.

SGLang looks through every loaded module for what a hook replaces, which takes a second for the
hooks of each stage, and a rank's first garbage collection takes another.
"""

import gc

from sglang.srt.plugins import load_plugins

load_plugins()
gc.freeze()
