"""Rows: prefill-decode disaggregation."""

from __future__ import annotations

from sglang_helix.srt.compatibility.conditions import disaggregated, flag, not_of_mla, of_mla
from sglang_helix.srt.compatibility.row import WITHOUT, Given, Row
from sglang_helix.srt.compatibility.situation import Situation


def _other_transfer(situation: Situation) -> object | None:
    """A transfer backend but Mooncake."""
    backend = situation.args.disaggregation_transfer_backend
    by_mooncake = backend in ("mooncake", "mooncake_tcp")
    return None if by_mooncake or disaggregated(situation) is None else backend


def _transfer_of_sglang(situation: Situation) -> object | None:
    """What of disaggregation is not proven: other backends, and host copies of what is decoded."""
    if disaggregated(situation) is None:
        return None
    offload = situation.args.disaggregation_decode_enable_offload_kvcache
    return _other_transfer(situation) or offload or None


def _transferred(
    given: Given,
) -> Given:
    """Of a disaggregated server."""
    return lambda situation: given(situation) if disaggregated(situation) else None


def _states_or_windows(situation: Situation) -> object | None:
    beside = situation.windows or situation.hybrid is not None
    return disaggregated(situation) if beside else None


def _staging(situation: Situation) -> object | None:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_DISAGG_STAGING_BUFFER.get()) or None


TRANSFERS: tuple[Row, ...] = (
    Row(
        "prefill-decode disaggregation of MLA models by Mooncake",
        "--disaggregation-mode",
        "works",
        "from a plain prefill server and between equal layouts, answers are transformers'; other "
        "layouts are named at the first request",
        alone="serves",
        proof="test_kimi_linear_pd_dcp4; arg_groups/pd_disaggregation_hook.py",
    ),
    Row(
        "prefill-decode disaggregation of MLA models by NIXL, Mori, or with host copies",
        "--disaggregation-transfer-backend",
        "own",
        "between equal dcp sizes, and from a prefill server without one; host copies of what is "
        "decoded are --disaggregation-decode-enable-offload-kvcache",
        given=of_mla(_transfer_of_sglang),
        alone="serves",
        proof="arg_groups/pd_disaggregation_hook.py",
    ),
    Row(
        "prefill-decode disaggregation of GQA and MHA models by Mooncake",
        "--disaggregation-mode",
        "works",
        "from a plain prefill server whose ranks and the decode server's head shards divide one "
        "another, and between equal layouts, answers are transformers'; other layouts are named at "
        "the first request; a plain prefill server needs the series too",
        alone="refuses",
    ),
    Row(
        "prefill-decode disaggregation of GQA and MHA models by NIXL, Mori and others",
        "--disaggregation-transfer-backend",
        "refused",
        "it sends whole tokens from rank to rank, and a sharded rank has some tokens of the heads "
        "of a group",
        "Use --disaggregation-transfer-backend mooncake, or leave --dcp-size out",
        not_of_mla(_other_transfer),
        alone="refuses",
    ),
    Row(
        "recurrent states or windows in prefill-decode disaggregation of GQA and MHA models",
        "--disaggregation-mode",
        "refused",
        "states and windows are sent beside K and V, which has not been tried",
        WITHOUT,
        not_of_mla(_states_or_windows),
        alone="refuses",
    ),
    Row(
        "decoded K and V in the hierarchical cache",
        "--disaggregation-decode-enable-offload-kvcache",
        "refused",
        "it has not been tried",
        "Leave the flag out",
        not_of_mla(_transferred(flag("disaggregation_decode_enable_offload_kvcache"))),
        alone="refuses",
    ),
    Row(
        "checksums of what is transferred",
        "--disaggregation-enable-kv-checksum",
        "refused",
        "a sharded rank's pages hold other bytes than those of the rank that sent them",
        "Leave the flag out",
        _transferred(flag("disaggregation_enable_kv_checksum")),
    ),
    Row(
        "staged transfers",
        "SGLANG_DISAGG_STAGING_BUFFER",
        "refused",
        "the staging buffer gathers heads, not the tokens of an owner",
        "Unset the variable",
        _transferred(_staging),
    ),
    Row(
        "switching disaggregation roles",
        "--enable-pd-role-switch",
        "refused",
        "it is prefill-decode disaggregation that rebuilds no groups",
        WITHOUT,
        flag("enable_pd_role_switch"),
        alone="refuses",
    ),
)
