"""Which bytes go where, over many layouts and without a server: the rows of K and V by owner."""

import itertools
import random
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang_helix.srt.disaggregation.mooncake import conn
from sglang_helix.srt.distributed.topology import Layout

pytestmark = pytest.mark.quick

KV_HEADS = (1, 2, 4, 6)
LAYERS, HEAD = 2, 3
#: A prefill server's ranks, a decode server's ranks and its K, key-value heads, page size, and
#: pages that the decode server already has.
LAYOUTS = [
    (prefill, decode, kvp, heads, page, prefix)
    for prefill, decode, heads in itertools.product((1, 2, 3, 4, 8), (2, 3, 4, 6, 8), KV_HEADS)
    for kvp in (2, 3, 4, 8)
    if decode % kvp == 0
    if not any(a % heads and heads % a for a in (prefill, decode, decode // kvp))
    if conn.mismatch(Layout(prefill, 1), Layout(decode, kvp), mla=False) is None
    for page, prefix in ((1, 0), (4, 2))
]


def manager_of(rank: int, ranks: int, heads: int, page: int, pools: list[np.ndarray]) -> Any:
    """As much of a MooncakeKVManager as sends; its engine copies inside this process."""
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    def transfer(session: str, blocks: list[tuple[int, int, int]]) -> int:
        for source, target, length in blocks:
            there[target : target + length] = here[source : source + length]
        return 0

    # Addresses are offsets into one array of bytes on each side.
    here, there = pools
    manager = SimpleNamespace(
        is_mla_backend=False,
        is_hybrid_mla_backend=False,
        attn_tp_size=ranks,
        dcp_size=1,
        pp_size=1,
        max_transfer_batch_indices=5,
        _transfer_data=transfer,
        kv_args=SimpleNamespace(
            engine_rank=rank, total_kv_head_num=heads, page_size=page, prefill_start_layer=0
        ),
    )
    manager.get_mha_kv_ptrs_with_pp = CommonKVManager.get_mha_kv_ptrs_with_pp.__get__(manager)
    return manager


def describe(manager: Any, held: int, rows: int) -> None:
    """Lay out K of every layer and then V in one array: `held` heads a row."""
    page = manager.page_size
    manager.kv_item_lens = [page * held * HEAD] * (2 * LAYERS)
    manager.kv_data_ptrs = [entry * rows * held * HEAD for entry in range(2 * LAYERS)]


def held_by(rank: int, ranks: int, heads: int) -> range:
    """Key-value heads of a rank, as plain TP gives them."""
    first = rank * heads // ranks
    return range(first, first + max(1, heads // ranks))


def server_info(ranks: int, kvp: int) -> Any:
    """What a prefill server with the series registers."""
    from sglang.srt.disaggregation.common.conn import PrefillServerInfo

    manager = SimpleNamespace(kv_layout=None, dcp_size=kvp)
    conn.mark_layout(manager)
    return PrefillServerInfo(ranks, 1, 1, 1, 1, None, True, kv_layout=manager.kv_layout)


def mapped(rank: int, decode: Layout, prefill: int, prefill_kvp: int = 1) -> Any:
    """The ranks that a decode rank asks, by upstream's own mapping and ours."""
    from sglang.srt.disaggregation.common.conn import CommonKVManager

    class Decode(CommonKVManager):
        def __init__(self) -> None:
            self.is_mla_backend = self.is_hybrid_mla_backend = False
            self.enable_all_cp_ranks_for_transfer = False
            self.attn_tp_size, self.dcp_size = decode.tp_size, decode.kvp_size
            self.attn_cp_size, self.attn_cp_rank, self.pp_size, self.pp_rank = 1, 0, 1, 0
            self.kv_args = SimpleNamespace(engine_rank=rank)

    info = server_info(prefill, prefill_kvp)
    manager = Decode()
    manager._resolve_rank_mapping(info)
    conn._map_ranks(manager, info)
    return info


def test_every_row_arrives_at_its_owner() -> None:
    """Chunks that end at pages, behind a prefix, into random pages; nothing else is written."""
    assert len(LAYOUTS) == 200
    for layout in LAYOUTS:
        transfer(*layout)


@pytest.mark.parametrize(
    ("prefill", "decode", "named"),
    [
        (Layout(4, 2), Layout(4, 4), ("on 4 ranks with --dcp-size 2", "4 with --dcp-size 4")),
        (Layout(4, 2), Layout(2, 2), ("on 4 ranks with --dcp-size 2", "2 with --dcp-size 2")),
        (Layout(4, 2), Layout(4, 1), ("on 4 ranks with --dcp-size 2", "4 with --dcp-size 1")),
        (Layout(3, 1), Layout(4, 2), ("on 3 ranks", "2 head shards", "a multiple")),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit(prefill: Layout, decode: Layout, named: tuple[str, ...]) -> None:
    """Both values are named, and every prefill rank is asked by every decode rank, to say so."""
    mismatch = conn.mismatch(prefill, decode, mla=False)
    assert mismatch is not None
    assert all(part in mismatch for part in named)
    if decode.kvp_size > 1:
        for rank in range(decode.tp_size):
            info = mapped(rank, decode, prefill.tp_size, prefill.kvp_size)
            assert info.target_tp_ranks == list(range(prefill.tp_size))
            assert info.required_dst_info_num == decode.tp_size


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kv_layout": None}, "127.0.0.1:1 runs without sglang-helix"),
        ({"attn_cp_size": 2}, "--attn-cp-size 2"),
        ({"enable_kv_cache_sharding": True}, "--enable-kv-cache-sharding"),
    ],
    ids=str,
)
def test_prefill_servers_that_would_end_are_not_asked(fields: dict[str, Any], reason: str) -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    info = server_info(2, 1)
    for name, value in fields.items():
        setattr(info, name, value)
    said: list[Any] = []
    manager = SimpleNamespace(
        dcp_size=2,
        is_mla_backend=False,
        is_hybrid_mla_backend=False,
        prefill_info_table={"127.0.0.1:1": info},
        record_failure=lambda room, text: said.append((room, text)),
        update_status=lambda room, status: said.append((room, status)),
    )
    receiver = SimpleNamespace(kv_mgr=manager, bootstrap_addr="127.0.0.1:1", bootstrap_room=5)
    conn.init_receiver(pytest.fail, receiver, 0)
    assert receiver.conclude_state == KVPoll.Failed
    (room, text), status = said
    assert room == 5
    assert reason in text
    assert status == (5, KVPoll.Failed)


@pytest.mark.parametrize(
    ("rejected", "recorded", "said"),
    [
        ({"b": "layouts"}, {}, "layouts"),
        ({"b": "layouts"}, {5: "its own"}, "its own"),
        ({"c": "layouts"}, {}, None),
    ],
    ids=["another rank was first", "this rank was", "a peer of other requests"],
)
def test_every_rank_knows_why_a_peer_is_rejected(
    rejected: dict[str, str], recorded: dict[int, str], said: str | None
) -> None:
    manager = SimpleNamespace(
        session_lock=threading.Lock(),
        failure_lock=threading.Lock(),
        state_layout_rejections=rejected,
        transfer_infos={5: {"a": None, "b": None}},
        failure_records=recorded,
    )
    conn.name_rejection(SimpleNamespace(kv_mgr=manager, bootstrap_room=5))
    conn.name_rejection(SimpleNamespace(kv_mgr=manager, bootstrap_room=6))
    assert manager.failure_records == ({5: said} if said else {})


def test_models_that_are_not_the_same_are_named() -> None:
    manager = manager_of(0, 2, 4, 4, [np.zeros(0), np.zeros(0)])
    describe(manager.kv_args, 2, 8)
    there = SimpleNamespace(page_size=4)
    describe(there, 4, 8)
    peer = SimpleNamespace(
        dst_attn_tp_size=2,
        dst_dcp_size=2,
        requires_dcp_relayout=True,
        dst_kv_item_lens=there.kv_item_lens,
    )
    assert conn.validate_peer_state_layout(lambda *_: (True, None), manager, peer) == (True, None)
    peer.dst_kv_item_lens = [2 * length for length in there.kv_item_lens]
    _, reason = conn.validate_peer_state_layout(pytest.fail, manager, peer)
    assert reason is not None
    assert "has [24] bytes in 2 key-value heads, of the decode rank [96] in 4" in reason
    peer.dst_kv_item_lens = there.kv_item_lens * 2
    _, reason = conn.validate_peer_state_layout(pytest.fail, manager, peer)
    assert reason is not None
    assert "has 4 buffers of K and V, the decode rank 8" in reason


def transfer(ranks: int, decode_ranks: int, kvp: int, heads: int, page: int, prefix: int) -> None:
    generator = random.Random(f"{ranks} {decode_ranks} {kvp} {heads} {page}")
    decode = Layout(decode_ranks, kvp)
    wide = page * kvp
    cached, length = prefix * wide, prefix * wide + generator.randrange(1, 5 * wide)
    pages = -(-length // page)
    source_pages = np.array(generator.sample(range(1, 2 * pages + 1), pages), dtype=np.int32)
    target_pages = np.array(
        generator.sample(range(1, 16), -(-length // wide) - prefix), dtype=np.int32
    )
    source_rows, target_rows = (2 * pages + 1) * page, 16 * page
    values = np.frombuffer(generator.randbytes(2 * LAYERS * length * heads * HEAD), np.uint8)
    values = values.reshape(2 * LAYERS, length, heads, HEAD) // 2 + 1  # 0 is what was not written

    held = decode.kv_heads(heads)
    received = [
        np.zeros((2 * LAYERS, target_rows, held, HEAD), np.uint8) for _ in range(decode_ranks)
    ]
    asked: dict[int, list[int]] = {}
    for rank in range(decode_ranks):
        info = mapped(rank, decode, ranks)
        assert info.required_prefill_response_num == len(info.target_tp_ranks)
        for prefill in info.target_tp_ranks:
            asked.setdefault(prefill, []).append(rank)
            assert info.required_dst_info_num == kvp * max(1, decode.attn_tp_size // ranks)
    for prefill in range(ranks):
        assert len(asked[prefill]) == info.required_dst_info_num
        mine = held_by(prefill, ranks, heads)
        here = np.zeros((2 * LAYERS, source_rows, len(mine), HEAD), np.uint8)
        tokens = np.arange(length)
        rows = source_pages[tokens // page] * page + tokens % page
        here[:, rows] = values[:, :, mine.start : mine.stop]
        for rank in asked[prefill]:
            pools = [here.reshape(-1), received[rank].reshape(-1)]
            manager = manager_of(prefill, ranks, heads, page, pools)
            describe(manager.kv_args, len(mine), source_rows)
            there = SimpleNamespace(page_size=page)
            describe(there, held, target_rows)
            chunk = 3 * page
            for start in range(cached, length, chunk):
                end = min(start + chunk, length)
                assert (
                    conn.send_kvcache_dcp(
                        pytest.fail,
                        manager,
                        "session",
                        source_pages[start // page : -(-end // page)],
                        there.kv_data_ptrs,
                        target_pages,
                        dcp_token_item_lens=[],
                        dst_dcp_size=kvp,
                        dst_dcp_rank=decode.kvp_rank(rank),
                        src_page_offset=(start - cached) // page,
                        decode_prefix_len=cached,
                        num_kv_tokens=end - start,
                        dst_kv_item_lens=there.kv_item_lens,
                        dst_tp_rank=rank,
                        dst_attn_tp_size=decode_ranks,
                    )
                    == 0
                )
    for rank in range(decode_ranks):
        want = np.zeros_like(received[rank])
        owned = np.arange(cached, length)
        owned = owned[owned % kvp == decode.kvp_rank(rank)]
        local = (owned - cached) // kvp
        mine = held_by(decode.attn_shard(rank), decode.attn_tp_size, heads)
        want[:, target_pages[local // page] * page + local % page] = values[
            :, owned, mine.start : mine.stop
        ]
        np.testing.assert_array_equal(received[rank], want)
