"""Decode and extend over a cache sharded on K ranks, against unsharded attention in float64."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_helix.helix import SeriesError
from sglang_helix.srt.layers.attention import sharded
from sglang_helix.srt.layers.attention.windows import Tails
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.layers.attention.steps import (  # noqa: F401 the fixture
    RELATIVE_ERROR,
    Heads,
    Pool,
    Step,
    Tokens,
    _ranks_are_threads,
    backend_of,
    check,
    exact,
    forward_batch,
    gqa_on_rank,
    layer_of,
    mla_on_rank,
    random_tokens,
    sinks_of,
)
from srt.slots import Slots
from srt.threads import ThreadGroup, run_threads

pytestmark = pytest.mark.quick

CACHED = Tokens(
    torch.empty(0),
    *(torch.randn(13, 2, n).to(torch.float8_e4m3fn) for n in (16, 8)),
)


def tails_on_rank(rank: int, group: ThreadGroup) -> Any:
    """Two requests of 13 and no cached tokens in fp8; the second's chunk has nothing before it."""
    shard, slots = KVShard(group.world_size, rank), Slots(group.world_size, 4, pages=30)
    pool = Pool(slots.rows, shard, Heads(4, 2, 16, 8))
    pool.keys, pool.values = pool.keys.to(CACHED.k.dtype), pool.values.to(CACHED.v.dtype)
    own = shard.read_rows(torch.tensor(slots.extend(0, 13)))
    pool.keys[own], pool.values[own] = CACHED.k[rank :: shard.size], CACHED.v[rank :: shard.size]
    slots.extend(1, 2)
    tails = Tails.of(8, [13, 0], [3, 2], torch.tensor([0, 1]), slots.table(), shard)
    layer = layer_of(4, 2, Heads(4, 2, 16, 8))
    layer.k_scale = layer.v_scale = torch.ones(1)
    layer.k_scale_float, layer.v_scale_float = 0.5, 0.25
    assert (tails.lens, tails.cu_keys.tolist(), tails.longest) == ([7, 0], [0, 10, 12], 10)
    assert tails.behind.tolist() == [*range(7), 7, 8, 9, 10, 11]
    return tails.gathered(layer, pool, torch.zeros(1), group)


@pytest.mark.parametrize("ranks", [2, 4])
def test_tails_of_an_fp8_cache_are_scaled(ranks: int) -> None:
    for k, v in run_threads(tails_on_rank, ranks, tp_size=ranks, dcp_comm_backend="a2a"):
        assert torch.equal(k, CACHED.k[6:].float() * 0.5)
        assert torch.equal(v, CACHED.v[6:].float() * 0.25)


def test_chunks_without_a_prefix_gather_nothing() -> None:
    shard, slots = KVShard(2, 0), Slots(2, 4, pages=30)
    pool = Pool(slots.rows, shard, Heads(4, 2, 16, 8))
    slots.extend(0, 3)
    tails = Tails.of(8, [0, 0], [3, 2], torch.tensor([0, 1]), slots.table(), shard)
    new = torch.ones(5, 2, 16, dtype=torch.bfloat16)
    k, v = tails.gathered(layer_of(4, 2, Heads(4, 2, 16, 8)), pool, new, None)
    assert (k.shape, v.shape, k.dtype) == ((0, 2, 16), (0, 2, 8), new.dtype)
    assert tails.before(k, new) is new


GQA = [
    # ranks, heads: one key-value head, a few, as many as queries, groups that ranks cut through.
    (2, Heads(4, 1, 16, 16)),
    (2, Heads(8, 4, 16, 16)),
    (3, Heads(6, 2, 16, 24)),
    (4, Heads(8, 2, 80, 80)),
    (4, Heads(8, 8, 16, 16)),
    (8, Heads(16, 4, 16, 16)),
]


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("exchange", ["a2a", "ag_rs"])
@pytest.mark.parametrize(("ranks", "heads"), GQA)
def test_gqa(ranks: int, heads: Heads, exchange: str, replicated: bool) -> None:
    for page, sinks, window in (
        (1, False, 0),
        (16, False, 0),
        (16, True, 0),
        (16, True, ranks),
        (1, False, 4 * ranks),
    ):
        outputs = run_threads(
            gqa_on_rank,
            ranks,
            heads,
            page,
            replicated,
            sinks,
            window,
            tp_size=ranks,
            dcp_comm_backend=exchange,
        )
        sunk = sinks_of(heads) if sinks else None
        check(outputs, random_tokens(heads, 0, mla=False), sunk, window)


@pytest.mark.parametrize("exchange", ["a2a", "ag_rs"])
@pytest.mark.parametrize(
    ("ranks", "heads"),
    [(2, Heads(4, 1, 48, 32)), (4, Heads(8, 1, 48, 32)), (8, Heads(16, 1, 24, 16))],
)
def test_mla(ranks: int, heads: Heads, exchange: str) -> None:
    for page in (1, 16):
        outputs = run_threads(
            mla_on_rank, ranks, heads, page, exchange, tp_size=ranks, dcp_comm_backend=exchange
        )
        check(outputs, random_tokens(heads, 1, mla=True))


def unabsorbed(rank: int, group: ThreadGroup, heads: Heads) -> torch.Tensor:
    tokens = random_tokens(heads, 2, mla=False)
    slots = Slots(group.world_size, 16, pages=50)
    backend = backend_of(rank, group, heads, slots, mla=True)
    own = heads.queries // group.world_size
    mine = slice(own * rank, own * (rank + 1))
    batch, order = forward_batch(Step("extend", {0: 1, 1: 9}), slots)
    q, k, v = (torch.stack([part[r, t] for r, t in order])[:, mine] for part in tokens)
    backend.init_forward_metadata(batch)
    layer = layer_of(own, own, heads)
    return backend.forward_extend(q.flatten(1), k, v, layer, batch, save_kv_cache=False)


def test_mla_unabsorbed_first_chunk() -> None:
    """Keys and values of a rank's own heads: nothing is gathered, whatever the exchange is."""
    heads = Heads(8, 8, 24, 16)
    outputs = run_threads(unabsorbed, 4, heads, tp_size=4, dcp_comm_backend="fi_a2a")
    tokens = random_tokens(heads, 2, mla=False)
    wanted = torch.stack([exact(tokens, 0, 0), *(exact(tokens, 1, t) for t in range(9))])
    got = torch.cat([out.view(10, 2, 16) for out in outputs], dim=1).double()
    assert (got - wanted).norm() < RELATIVE_ERROR * wanted.norm()


def test_own_kv_heads_by_query_head() -> None:
    """Every division of H query heads over G key-value heads and K ranks, one head at a time."""
    for ranks, own in itertools.product((1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 8)):
        total = ranks * own
        for groups in [g for g in range(1, total + 1) if total % g == 0]:
            k = torch.arange(groups).view(1, groups, 1)
            for rank in range(ranks):
                backend = SimpleNamespace(shard=KVShard(ranks, rank))
                found_k, found_v = sharded.ShardedAttention._own_kv_heads(
                    backend, torch.empty(1, own, 1), k, -k
                )
                width = found_k.shape[1]
                assert own % width == 0, "the kernel could not group its heads"
                for head in range(own):
                    wanted = (own * rank + head) // (total // groups)
                    assert found_k[0, head // (own // width), 0] == wanted
                    assert found_v[0, head // (own // width), 0] == -wanted


def refused(rank: int, group: ThreadGroup, arguments: dict[str, Any]) -> str:
    heads = Heads(4, 2, 16, 16)
    backend = backend_of(rank, group, heads, slots := Slots(group.world_size, 16, 9), mla=False)
    batch, _ = forward_batch(Step("extend", {0: 1}), slots)
    given = {"k": torch.zeros(1, 2, 16), **arguments}
    k = given.pop("k")
    with pytest.raises(NotImplementedError) as error:
        backend.forward_extend(torch.zeros(1, 32), k, k, layer_of(2, 2, heads), batch, **given)
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"k": None}, "another layer's cache"), ({"temp": torch.zeros(2)}, "attention with temp")],
)
def test_what_no_adapter_computes_is_refused(arguments: dict[str, Any], named: str) -> None:
    said = run_threads(refused, 2, arguments, tp_size=2, dcp_comm_backend="a2a")
    assert all(named in message and "--dcp-size" in message for message in said)


def test_an_unknown_exchange_is_no_backend() -> None:
    """fi_a2a is MLA's alone: argument resolution replaces or refuses it for GQA."""
    with pytest.raises(SeriesError, match="no fi_a2a exchange was made for the KVP group"):
        run_threads(
            lambda rank, group: backend_of(rank, group, Heads(4, 2, 8, 8), Slots(2, 1, 9), False),
            2,
            tp_size=2,
            dcp_comm_backend="fi_a2a",
        )
