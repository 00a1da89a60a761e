"""Inside a draft's scope every name reads as under plain TP; outside, nothing of it is left."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
from sglang.srt.runtime_context import get_parallel
from sglang_helix.hook import SeriesError
from sglang_helix.srt.layers.attention.attention_registry import absorbed_mla_backends
from sglang_helix.srt.layers.attention.sharded import ShardedAttention
from sglang_helix.srt.layers.attention.triton_backend import draft_pages
from sglang_helix.srt.speculative.spec_utils import check_scope, draft_tp_context

pytestmark = pytest.mark.quick

SHARDED = {
    "tp_size": 4,
    "dcp_size": 2,
    "dcp_rank": 1,
    "dcp_enabled": True,
    "attn_dcp_size": 2,
    "attn_dcp_rank": 1,
    "dcp_replicate_q_proj": True,
}
WHOLE = {
    "tp_size": 4,
    "dcp_size": 1,
    "dcp_rank": 0,
    "dcp_enabled": False,
    "attn_dcp_size": 1,
    "attn_dcp_rank": 0,
    "dcp_replicate_q_proj": False,
}


def read() -> dict[str, Any]:
    return {name: getattr(get_parallel(), name) for name in SHARDED}


def scope() -> Any:
    return draft_tp_context(lambda layout: nullcontext(), None)


def test_plain_tp_inside_and_as_before_outside() -> None:
    added = [*absorbed_mla_backends()]
    before = FORWARD_ABSORB_CORE_ATTENTION_BACKENDS[:]
    FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.extend(added)
    listed = FORWARD_ABSORB_CORE_ATTENTION_BACKENDS[:]
    try:
        with get_parallel().override(**SHARDED):
            with scope():
                with scope():
                    assert read() == WHOLE
                assert read() == WHOLE
                assert before == FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
            assert read() == SHARDED
            with pytest.raises(ZeroDivisionError), scope():
                raise ZeroDivisionError
            assert read() == SHARDED
            assert listed == FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
    finally:
        FORWARD_ABSORB_CORE_ATTENTION_BACKENDS[:] = before


@pytest.mark.parametrize("draft", [True, False])
def test_a_pass_on_the_wrong_side_is_an_error(draft: bool) -> None:
    runner = SimpleNamespace(is_draft_worker=draft)
    with get_parallel().override(**SHARDED):
        right, wrong = (scope, nullcontext) if draft else (nullcontext, scope)
        with right():
            check_scope(runner)
        with wrong(), pytest.raises(SeriesError, match="inside" if not draft else "outside"):
            check_scope(runner)


def test_attention_built_on_the_wrong_side_is_an_error() -> None:
    runner = SimpleNamespace(
        is_draft_worker=True, token_to_kv_pool_allocator=SimpleNamespace(page_size=8)
    )
    backend = SimpleNamespace(page_size=4)
    with get_parallel().override(**SHARDED):
        with pytest.raises(SeriesError, match="must not go by owner"):
            ShardedAttention(runner)
        with pytest.raises(SeriesError, match="outside draft_tp_context"):
            draft_pages(None, backend, runner)
        with scope():
            draft_pages(None, backend, runner)
    assert backend.page_size == 8
