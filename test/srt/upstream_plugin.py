"""A pytest plugin (``-p srt.upstream_plugin``): SGLang's own tests meet the whole series.

docs/upstream-tests.md says how to run them and what came of it.
"""

from sglang.srt.plugins import load_plugins
from sglang_helix.plugin import install_serve_stage

load_plugins()
install_serve_stage()
