"""The real launcher, with the series broken on purpose somewhere: it says why, and never serves.

One thing is broken in every process of the server, or only in its ranks, before SGLang loads any
plugin.
"""

from pathlib import Path

import pytest
from sglang_cpu_reference.checkpoints import make_checkpoint
from sglang_cpu_reference.server import Server, ServerError

BREAK = """
import multiprocessing
from sglang_helix import hook, plugin

def in_a_rank():
    return multiprocessing.parent_process() is not None

{body}
"""

LAUNCH_HOOK = """
check = hook.Hook.check
hook.Hook.check = lambda self: (
    "broken on purpose" if self.target.endswith("Scheduler.get_init_info") else check(self)
)
"""

SERVE_HOOK_IN_THE_RANKS = """
check = hook.Hook.check
hook.Hook.check = lambda self: (
    "broken on purpose" if in_a_rank() and self.target.endswith("enable_fused_set_kv_buffer")
    else check(self)
)
"""

NO_SERIES_IN_THE_RANKS = """
register = plugin.register
plugin.register = lambda: None if in_a_rank() else register()
"""

OTHER_VERSION = """
hook.SUPPORTED_SGLANG = ("0.0.1",)
"""


@pytest.mark.server
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(LAUNCH_HOOK, "broken on purpose", id="launch hook"),
        pytest.param(SERVE_HOOK_IN_THE_RANKS, "broken on purpose", id="serve hook"),
        pytest.param(NO_SERIES_IN_THE_RANKS, "without the series", id="rank without the series"),
        pytest.param(OTHER_VERSION, "supports sglang 0.0.1, but 0.5.23 is", id="other version"),
    ],
)
def test_nothing_is_served(tmp_path: Path, body: str, reason: str) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "llama")
    # Ranks without the series die by themselves where upstream refuses DCP on the platform; over a
    # whole cache they would start.
    sharded = () if body == NO_SERIES_IN_THE_RANKS else ("--dcp-size", "2")
    server = Server(checkpoint, "--tp", "2", *sharded, prelude=BREAK.format(body=body))
    with pytest.raises(ServerError, match=r"exited with status [^0]") as refused, server:
        pass
    assert reason in str(refused.value)
