"""What the modules under `srt` ask of the form they run in: here, the plugin beside SGLang.

They go into SGLang's own tree as they are (`export/`), where `export/in_tree.py` is in the place of
this module. What is the plugin's alone is outside `srt`.
"""

from __future__ import annotations

from sglang_helix import __version__
from sglang_helix.hook import SeriesError, installed_sglang
from sglang_helix.plugin import before_process_groups, installed_stages

__all__ = [
    "ATTN_TP_SIZE",
    "REPLICATE_V_PROJ",
    "RUN_THE_SAME",
    "SeriesError",
    "__version__",
    "before_process_groups",
    "installed_sglang",
    "installed_stages",
]

#: Attribute of a ServerArgs that holds A. SGLang's `attn_tp_size` is another, derived name (tp / dp
#: / cp); a field cannot be added from outside, but what begins with an underscore is pickled too.
ATTN_TP_SIZE = "_helix_attn_tp_size"

#: The same of `--dcp-replicate-v-proj`.
REPLICATE_V_PROJ = "_helix_dcp_replicate_v_proj"

#: What to do where some rank runs another series, or none.
RUN_THE_SAME = "install the same sglang-helix everywhere and leave it in SGLANG_PLUGINS"
