"""A prefill server and decode servers that are laid out otherwise.

Extends `disaggregation/mooncake/conn.py`. Latents are SGLang's affair: each row goes to its owner.
K and V go from plain TP to owners of tokens *and* shards of heads. To a plain prefill server a
decode server of N = A * K ranks is one of A ranks, each of them K-fold: upstream's arithmetic of
unequal TP sizes says which heads, its plan of a sharded latent which tokens.

Both servers must know that: a prefill server says so as it registers (`mark_layout`), and each
decode rank says N, K and its ranks when it first meets a prefill rank. Where the layouts do not
fit, every prefill rank rejects every decode rank, and requests end on both sides with the reason.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_helix.srt.distributed.topology import Layout

_MARK = "sglang_helix"


def mark_layout(manager: Any) -> None:
    """Before `register_to_bootstrap`: say that this prefill server knows sharded decode servers.

    Only pools of DeepSeek-V4 have a `kv_layout` of their own, and only its decode servers compare.
    """
    if manager.kv_layout is None:
        manager.kv_layout = json.dumps({_MARK: manager.dcp_size})


def _marked_dcp_size(info: Any) -> int | None:
    """K of a prefill server as it registered; None where it runs without the series."""
    try:
        return int(json.loads(info.kv_layout or "{}")[_MARK])
    except (ValueError, KeyError, TypeError):
        return None


def try_ensure_parallel_info(
    original: Callable[..., bool], manager: Any, bootstrap_addr: str
) -> bool:
    """Which prefill ranks a decode rank asks, and how many decode ranks ask each of them.

    Upstream raises for K and V by owner, which would end the decode server. What cannot be served
    is left to `init_receiver` and to the prefill ranks.
    """
    if manager.dcp_size == 1 or not _key_value(manager):
        return original(manager, bootstrap_addr)
    known = bootstrap_addr in manager.prefill_info_table
    plain = copy.copy(manager)
    plain.dcp_size = 1
    if not original(plain, bootstrap_addr):
        return False
    if not known:
        _map_ranks(manager, manager.prefill_info_table[bootstrap_addr])
    return True


def _map_ranks(manager: Any, info: Any) -> None:
    """Overwrite upstream's mapping of ranks where the prefill server is not laid out as this one.

    A plain one is asked as by a server of A ranks, by K of them in the place of each. One that does
    not fit is asked by all: each of its ranks answers why.
    """
    prefill = Layout(info.attn_tp_size, _marked_dcp_size(info) or 1)
    decode = Layout(manager.attn_tp_size, manager.dcp_size)
    if mismatch(prefill, decode, mla=False):
        info.target_tp_rank, info.target_tp_ranks = 0, list(range(prefill.tp_size))
        info.required_dst_info_num = decode.tp_size
        info.required_prefill_response_num = prefill.tp_size
    elif prefill.kvp_size == 1:
        shards = copy.copy(manager)
        shards.attn_tp_size, shards.kv_args = decode.attn_tp_size, copy.copy(manager.kv_args)
        shards.kv_args.engine_rank = decode.attn_shard(manager.kv_args.engine_rank)
        shards._resolve_rank_mapping(info)
        info.required_dst_info_num *= decode.kvp_size


def init_receiver(original: Callable[..., None], receiver: Any, prefill_dp_rank: int) -> None:
    """Begin a request on the decode side, unless its prefill server cannot even say no."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    manager = receiver.kv_mgr
    info = manager.prefill_info_table.get(receiver.bootstrap_addr)
    sharded = manager.dcp_size > 1 and _key_value(manager)
    if sharded and info is not None and (reason := _refusal(receiver.bootstrap_addr, info)):
        manager.record_failure(receiver.bootstrap_room, reason)
        manager.update_status(receiver.bootstrap_room, KVPoll.Failed)
        receiver.conclude_state = KVPoll.Failed
        return
    original(receiver, prefill_dp_rank)


def _refusal(addr: str, info: Any) -> str | None:
    if _marked_dcp_size(info) is None:
        return (
            f"the prefill server at {addr} runs without sglang-helix, or with an older one, and "
            "would end at a decode server whose K and V are sharded: install the same version there"
        )
    if info.attn_cp_size != 1 or info.enable_kv_cache_sharding:
        return (
            f"the prefill server at {addr} runs with --attn-cp-size {info.attn_cp_size}"
            f"{' and --enable-kv-cache-sharding' * info.enable_kv_cache_sharding}: a decode "
            "server whose K and V are sharded takes them from plain TP"
        )
    return None


def requires_dcp_relayout(
    original: Callable[..., bool], manager: Any, dst_dcp_size: int, dst_dcp_rank: int
) -> bool:
    """Whether a decode rank's rows are other than this prefill rank's; False where they never fit.

    Upstream raises there, in the thread that decode servers register with. It ends, and every
    request from then on waits for its timeout. `validate_peer_state_layout` rejects the peer.
    """
    return bool(manager.dcp_size == 1 < dst_dcp_size)


def prepare_dcp_token_item_lens(
    original: Callable[..., list[int]],
    manager: Any,
    dst_page_item_lens: Sequence[int | None],
    dst_dcp_size: int,
) -> list[int]:
    """Bytes of a token in each entry of this prefill rank.

    Upstream demands the decode rank's to be the same; of K and V they are of other heads.
    """
    if not _key_value(manager):
        return original(manager, dst_page_item_lens, dst_dcp_size)
    return [length // manager.kv_args.page_size for length in manager.kv_args.kv_item_lens]


def validate_peer_state_layout(
    original: Callable[..., tuple[bool, str | None]], manager: Any, registration_info: Any
) -> tuple[bool, str | None]:
    """What upstream checks of a decode rank that registers, and first the layouts.

    Requests to a rank that is rejected end with the reason.
    """
    peer = registration_info
    prefill = Layout(manager.attn_tp_size, manager.dcp_size)
    decode = Layout(peer.dst_attn_tp_size, peer.dst_dcp_size)
    reason = mismatch(prefill, decode, mla=not _key_value(manager))
    if reason is None and peer.requires_dcp_relayout and _key_value(manager):
        reason = _other_heads(manager, peer, decode)
    return (False, reason) if reason else original(manager, peer)


def name_rejection(sender: Any) -> None:
    """Before a sender's `failure_exception`: the reason that every prefill rank has for a peer.

    A request ends on all of them as soon as one has come to it, and the one that answers clients
    may not have. It would say that another knows.
    """
    manager, room = sender.kv_mgr, sender.bootstrap_room
    with manager.session_lock:
        rejected = manager.state_layout_rejections
        reasons = [rejected.get(session) for session in list(manager.transfer_infos.get(room, ()))]
    if reason := next(filter(None, reasons), None):
        with manager.failure_lock:
            manager.failure_records.setdefault(room, reason)


def name_mismatch(receiver: Any) -> None:
    """Before a receiver's `failure_exception`: for what its prefill server rejects it, if it does.

    That server says no more than that it failed.
    """
    manager = receiver.kv_mgr
    info = manager.prefill_info_table.get(receiver.bootstrap_addr)
    kvp_size = None if info is None else _marked_dcp_size(info)
    if kvp_size is None:
        return
    prefill = Layout(info.attn_tp_size, kvp_size)
    decode = Layout(manager.attn_tp_size, manager.dcp_size)
    if reason := mismatch(prefill, decode, mla=not _key_value(manager)):
        with manager.failure_lock:
            manager.failure_records[receiver.bootstrap_room] = reason


def mismatch(prefill: Layout, decode: Layout, *, mla: bool) -> str | None:
    """Why rows of a prefill server do not become those of a decode server; None where they do.

    Where neither server shards its cache, upstream says.
    """
    if prefill == decode or prefill.kvp_size == decode.kvp_size == 1:
        return None
    shards = sorted((prefill.tp_size, decode.attn_tp_size))
    if prefill.kvp_size == 1 and (mla or shards[1] % shards[0] == 0):
        return None
    advice = "give both servers the same --tp-size and --dcp-size, or the prefill server no "
    advice += "--dcp-size"
    if not mla:
        advice += ", and a --tp-size that divides the decode server's head shards or is a multiple"
    return (
        f"the prefill server attends on {prefill.tp_size} ranks with --dcp-size "
        f"{prefill.kvp_size}, the decode server on {decode.tp_size} with --dcp-size "
        f"{decode.kvp_size}, {decode.attn_tp_size} head shards: {advice}"
    )


def _other_heads(manager: Any, peer: Any, decode: Layout) -> str | None:
    """Why the heads of a decode rank cannot be those of this model; None where they are."""
    heads = manager.kv_args.total_kv_head_num
    ours, theirs = manager.kv_args.kv_item_lens, peer.dst_kv_item_lens
    mine, its = Layout(manager.attn_tp_size, 1).kv_heads(heads), decode.kv_heads(heads)
    if len(ours) > len(theirs) or (manager.pp_size == 1 and len(ours) != len(theirs)):
        return (
            f"the prefill rank has {len(ours)} buffers of K and V, the decode rank {len(theirs)}: "
            "both servers need the same model, without drafts"
        )
    if {length * its for length in ours} != {length * mine for length in theirs}:
        return (
            f"a page of the prefill rank has {sorted(set(ours))} bytes in {mine} key-value heads, "
            f"of the decode rank {sorted(set(theirs))} in {its}: both servers need the same model, "
            "--page-size and --kv-cache-dtype"
        )
    return None


def send_kvcache_dcp(original: Callable[..., int], manager: Any, *args: Any, **kwargs: Any) -> int:
    """Write a chunk to one decode rank: whole rows of latents as upstream does, or heads.

    Returns 0, or what the engine answered instead.
    """
    send = _send_heads if _key_value(manager) else original
    return send(manager, *args, **kwargs)


def _send_heads(
    manager: Any,
    mooncake_session_id: str,
    prefill_kv_indices: Any,
    dst_kv_ptrs: list[int],
    dst_kv_indices: Any,
    *,
    dst_attn_tp_size: int,
    dst_tp_rank: int,
    dst_dcp_size: int,
    dst_dcp_rank: int,
    dst_kv_item_lens: list[int],
    decode_prefix_len: int,
    src_page_offset: int,
    num_kv_tokens: int,
    pack_buffer: Any = None,
    **_: Any,
) -> int:
    """Of a chunk's K and V, the decode rank's tokens, of the heads that both ranks hold.

    prefill_kv_indices: int32 pages of this chunk here. dst_kv_indices: int32 widened pages of the
    whole request behind the prefix that the decode server has, `decode_prefix_len` tokens.
    src_page_offset: pages of earlier chunks. num_kv_tokens: of this chunk. dst_kv_item_lens: bytes
    of a page there.
    """
    from sglang.srt.disaggregation.common.utils import build_dcp_token_transfer_plan

    decode = Layout(dst_attn_tp_size, dst_dcp_size)
    plan = build_dcp_token_transfer_plan(
        prefill_kv_indices,
        dst_kv_indices,
        physical_page_size=manager.kv_args.page_size,
        dcp_size=decode.kvp_size,
        dcp_rank=dst_dcp_rank,
        decode_prefix_len=decode_prefix_len,
        src_page_offset=src_page_offset,
        num_kv_tokens=num_kv_tokens,
    )
    rows, to = plan.target_src_token_indices, plan.target_dst_token_indices
    if not rows.size:
        return 0
    slices = _slices(manager, dst_kv_ptrs, dst_kv_item_lens, decode, dst_tp_rank)
    if pack_buffer is not None:
        slices, rows = _packed(pack_buffer, slices, rows)
    batch = manager.max_transfer_batch_indices or 4096
    for start in range(0, rows.size, batch):
        runs = _runs(slices, rows[start : start + batch], to[start : start + batch])
        blocks = [block for piece in slices for block in piece.blocks(*runs)]
        if answer := manager._transfer_data(mooncake_session_id, blocks):
            return int(answer)
    return 0


class _Slice:
    """The heads of one entry that a prefill and a decode rank share.

    source, target: address of their first byte in row 0 of either; strides in bytes of a row.
    """

    def __init__(self, source: int, stride: int, target: int, to_stride: int, width: int) -> None:
        self.source, self.stride = source, stride
        self.target, self.to_stride, self.width = target, to_stride, width

    @property
    def whole(self) -> bool:
        """Whether rows that follow each other on both sides are one block of memory on both."""
        return self.stride == self.to_stride == self.width

    def blocks(self, rows: Any, to: Any, lengths: Any) -> list[tuple[int, int, int]]:
        """(address here, address there, bytes) of runs of rows [R], from their first ones."""
        columns = (rows * self.stride, to * self.to_stride, lengths * self.width)
        runs = zip(*(column.tolist() for column in columns), strict=True)
        return [(self.source + here, self.target + there, size) for here, there, size in runs]


def _runs(slices: list[_Slice], rows: Any, to: Any) -> tuple[Any, Any, Any]:
    """First row here, first row there and length of each run of rows [T] that is one block.

    Of all slices, which are whole together: they are of the same two ranks.
    """
    from sglang.srt.disaggregation.common.utils import group_concurrent_contiguous

    if not all(piece.whole for piece in slices):
        return rows, to, np.ones_like(rows)
    ours, theirs = group_concurrent_contiguous(rows, to)
    here, there = (np.array([run[0] for run in side]) for side in (ours, theirs))
    return here, there, np.array([len(run) for run in ours])


def _slices(
    manager: Any, dst_ptrs: list[int], dst_page_bytes: list[int], decode: Layout, rank: int
) -> list[_Slice]:
    """What of every layer's K and V goes to rank `rank` of a decode server."""
    from sglang.srt.disaggregation.common.staging_buffer import compute_head_slice_params

    kv_args = manager.kv_args
    first, heads, to_first, _ = compute_head_slice_params(
        manager.attn_tp_size,
        decode.attn_tp_size,
        kv_args.engine_rank,
        decode.attn_shard(rank),
        kv_args.total_kv_head_num,
    )

    def paired(ours: list[int], theirs: list[int]) -> list[tuple[int, int]]:
        """Entries here and those of the same layers there: K of all layers, then V of all."""
        k, v, to_k, to_v, _ = manager.get_mha_kv_ptrs_with_pp(ours, theirs)
        return [*zip(k, to_k, strict=True), *zip(v, to_v, strict=True)]

    slices = []
    addresses = paired(kv_args.kv_data_ptrs, dst_ptrs)
    pages = paired(kv_args.kv_item_lens, dst_page_bytes)
    for (ours, theirs), (page, to_page) in zip(addresses, pages, strict=True):
        stride, to_stride = page // kv_args.page_size, to_page // kv_args.page_size
        head = to_stride // decode.kv_heads(kv_args.total_kv_head_num)
        slices.append(
            _Slice(ours + first * head, stride, theirs + to_first * head, to_stride, heads * head)
        )
    return slices


def _packed(buffer: Any, slices: list[_Slice], rows: Any) -> tuple[list[_Slice], Any]:
    """The slices and rows as upstream's kernel packs them on a GPU, or as they are where too many.

    buffer: registered memory of this worker.
    """
    from sglang.srt.disaggregation.common.dcp_pack import try_pack_dcp_src

    packed = try_pack_dcp_src(
        pack_buffer=buffer,
        kv_data_ptrs=[piece.source for piece in slices],
        src_token_indices=rows,
        token_item_lens=[piece.width for piece in slices],
        src_token_item_lens=[piece.stride for piece in slices],
    )
    if packed is None:
        return slices, rows
    sources, rows = packed
    return [
        _Slice(source, piece.width, piece.target, piece.to_stride, piece.width)
        for source, piece in zip(sources, slices, strict=True)
    ], rows


def _key_value(manager: Any) -> bool:
    """Whether a manager's pool holds K and V, of which a rank has some heads."""
    return not (manager.is_mla_backend or manager.is_hybrid_mla_backend)
