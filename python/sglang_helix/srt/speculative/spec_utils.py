"""The scope in which a draft model runs. Extends `speculative/spec_utils.py`.

A draft's cache is whole on every rank, and its layers are plain TP's: they never join the KVP
group. So whatever builds or runs a draft must read a topology without one. SGLang enters
`draft_tp_context` around all of that, and around nothing of the target's; the one thing that it
leaves out is the draft's pool, whose size is the group's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
from sglang.srt.runtime_context import get_parallel

from sglang_helix.helix import SeriesError
from sglang_helix.srt.layers.attention.attention_registry import absorbed_mla_backends

_PLAIN_TP = {
    "attn_dcp_size": 1,
    "attn_dcp_rank": 0,
    "dcp_enabled": False,
    "dcp_size": 1,
    "dcp_rank": 0,
    "dcp_replicate_q_proj": False,
}


@contextmanager
def draft_tp_context(
    original: Callable[[Any], AbstractContextManager[Any]], layout: Any
) -> Iterator[None]:
    """Inside, `get_parallel()` has no KVP group; MLA attends as SGLang's own backends want it."""
    listed = FORWARD_ABSORB_CORE_ATTENTION_BACKENDS[:]
    with get_parallel().override(**_PLAIN_TP), original(layout):
        FORWARD_ABSORB_CORE_ATTENTION_BACKENDS[:] = [
            name for name in listed if name not in absorbed_mla_backends()
        ]
        try:
            yield
        finally:
            FORWARD_ABSORB_CORE_ATTENTION_BACKENDS[:] = listed


def check_scope(runner: Any, *args: Any, **kwargs: Any) -> None:
    """Before `ModelRunner.forward`: a draft runs inside the scope, the target outside of it.

    Raises SeriesError otherwise: the one would read a whole cache by owner, the other a sharded one
    as if it were whole.
    """
    inside = get_parallel().attn_dcp_size == 1
    if runner.is_draft_worker != inside:
        which = "draft" if runner.is_draft_worker else "target"
        raise SeriesError(
            f"a pass of the {which} model {'inside' if inside else 'outside'} draft_tp_context "
            "would read its cache by the wrong ranks' rows"
        )
