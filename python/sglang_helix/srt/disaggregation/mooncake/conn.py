"""A prefill server and decode servers that are laid out otherwise.

Extends `disaggregation/mooncake/conn.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def requires_dcp_relayout(
    original: Callable[..., bool], manager: Any, dst_dcp_size: int, dst_dcp_rank: int
) -> bool:
    """Whether a decode rank's rows are other than this prefill rank's; False where they never fit.

    Upstream raises there, in the thread that decode servers register with. It ends, and every
    request from then on waits for its timeout. `validate_peer_state_layout` rejects the peer.
    """
    if _mismatch(original, manager, dst_dcp_size, dst_dcp_rank):
        return False
    return original(manager, dst_dcp_size, dst_dcp_rank)


def validate_peer_state_layout(
    original: Callable[..., tuple[bool, str | None]], manager: Any, registration_info: Any
) -> tuple[bool, str | None]:
    """What upstream checks of a decode rank that registers, and first its place in its layout.

    Requests to a rank that is rejected end with the reason.
    """
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    size, rank = registration_info.dst_dcp_size, registration_info.dst_dcp_rank
    if mismatch := _mismatch(CommonKVManager.requires_dcp_relayout, manager, size, rank):
        return False, mismatch
    return original(manager, registration_info)


def _mismatch(judge: Callable[..., bool], manager: Any, size: int, rank: int) -> str | None:
    """Why this rank has not the rows of place `rank` of `size`, or None."""
    try:
        judge(manager, size, rank)
    except RuntimeError as refusal:
        return (
            f"the prefill server runs with --dcp-size {manager.dcp_size}, the decode server with "
            f"{size}, and place {manager.dcp_rank} met place {rank}: give both servers the same "
            f"--tp-size and --dcp-size, or the prefill server no --dcp-size ({refusal})"
        )
    return None
