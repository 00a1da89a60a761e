"""Requests with beams are refused one by one. Extends `beam_search/coordinator.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang_helix.srt.compatibility.rows.serving import BEAM_SEARCH
from sglang_helix.srt.compatibility.situation import Situation, attn_tp_size_of


def validate_and_init(coordinator: Any, req: Any, recv_req: Any) -> str | None:
    """The error of a request with `beam_width` > 1, by the compatibility table.

    Upstream lets beams through where `--page-size` is 1, but a sharded cache hands out slots in
    pages of K: every beam would take the next slot of the page where the prompt ends.
    """
    from sglang.srt.runtime_context import get_parallel, get_server_args

    asked = SimpleNamespace(
        beam_width=req.sampling_params.beam_width, dcp_size=get_parallel().attn_dcp_size
    )
    return BEAM_SEARCH.refusal(
        Situation(asked, coordinator.model_config, attn_tp_size_of(get_server_args()))
    )
