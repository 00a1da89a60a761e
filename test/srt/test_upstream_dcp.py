"""What SGLang's own tests of DCP assert, asserted here of the series.

Each test names the upstream files (under test/registered) whose assertions it takes over, in this
project's words and against this project's functions. docs/upstream-tests.md lists all of upstream's
DCP tests, with what became of each file itself.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.dcp.layout import filter_dcp_local_chunk_kv_indices, get_dcp_lens
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.runtime_context import get_parallel
from sglang.test.kernels.dcp import lse_weighted_combine_cpu
from sglang_helix.srt.distributed.topology import Layout
from sglang_helix.srt.layers.attention.adapters import ADAPTERS
from sglang_helix.srt.layers.attention.sharded import ShardedAttention
from sglang_helix.srt.layers.dcp.comm import cp_lse_ag_out_rs_mha, is_mla_dcp_lse_base_on_e
from sglang_helix.srt.layers.dcp.exchange import a2a, ag_rs
from sglang_helix.srt.layers.dcp.lse_combine import combine, pack, rescale
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.layers.dcp.packed_rows import unpack
from sglang_helix.srt.layers.linear import heads_shared_by, qkv_parallel_linear_init
from sglang_helix.srt.mem_cache.memory_pool import mla_set_kv_buffer
from srt.slots import Slots
from srt.threads import ThreadGroup, run_threads

pytestmark = pytest.mark.quick

INF = math.inf
LAYER = SimpleNamespace(layer_id=0)
SHARDS = [KVShard(size, rank) for size in (1, 2, 3, 4, 8) for rank in range(size)]
PAGE = 4


def as_rank(shard: KVShard) -> Any:
    """SGLang's view of this rank, while in a ``with`` statement."""
    return get_parallel().override(
        dcp_enabled=shard.size > 1,
        dcp_size=shard.size,
        dcp_rank=shard.rank,
        attn_dcp_size=shard.size,
        attn_dcp_rank=shard.rank,
    )


# --- who owns what ------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_lens_count_owned_positions(shard: KVShard) -> None:
    """dcp/test_dcp_layout_unit.py, dcp/test_dcp_decode_partition_unit.py."""
    lens = torch.arange(66)
    owners = lens % shard.size
    counted = torch.tensor([int((owners[:length] == shard.rank).sum()) for length in lens])
    assert torch.equal(shard.lens(lens), counted)
    assert torch.equal(shard.lens(lens), get_dcp_lens(lens, shard.size, shard.rank))
    # A new token makes its owner's share grow, by one, and nobody else's.
    assert torch.equal(shard.lens(lens).diff(), (owners[:-1] == shard.rank).long())
    # A chunk in the middle holds what its end counts and its start does not.
    for start in (0, 1, 2, 5, 7, 13, 31):
        chunk = shard.lens(start + lens) - shard.lens(torch.tensor(start))
        wanted = get_dcp_lens(lens, shard.size, shard.rank, start=torch.full_like(lens, start))
        assert torch.equal(chunk, wanted)


def test_ranks_share_cells_and_pages_evenly() -> None:
    """dcp/test_dcp_layout_unit.py: a page allocated K times as wide leaves no rank short."""
    size, page = 4, 64
    lens = torch.tensor([0, 1, 2, 3, 4, 63, 64, 65, 255, 256, 257, 515])
    shares = torch.stack([KVShard(size, rank).lens(lens) for rank in range(size)])
    assert torch.equal(shares.sum(0), lens)
    allocated = -(-lens // (page * size))
    unused = allocated - -(-shares // page)
    assert ((unused == 0) | (unused == 1)).all()
    whole = lens[lens % (page * size) == 0]
    for rank in range(size):
        assert torch.equal(KVShard(size, rank).lens(whole) * size, whole)


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_read_rows_of_any_prefix(shard: KVShard) -> None:
    """dcp/test_dcp_layout_unit.py (owner filter), dcp/test_dcp_block_tables.py."""
    slots = Slots(shard.size, PAGE, pages=600)
    for request, length in enumerate([1, 37, 0, 1365, 64 * shard.size, 7]):
        prefix = torch.tensor(slots.extend(request, length), dtype=torch.int64)
        rows = shard.read_rows(prefix)
        assert torch.equal(rows, prefix[prefix % shard.size == shard.rank] // shard.size)
        assert len(rows) == shard.lens(torch.tensor(length))
        with as_rank(shard):
            upstream = filter_dcp_local_chunk_kv_indices(
                prefix, torch.tensor([0]), torch.tensor([length])
            )
        assert torch.equal(rows, upstream // shard.size)
        # Local tokens fill local pages in order: a table of every page's first row finds them all.
        nth = torch.arange(len(rows))
        assert torch.equal(rows, rows[nth // PAGE * PAGE] + nth % PAGE)
        assert (rows[::PAGE] % PAGE == 0).all()


@pytest.mark.parametrize("size", [2, 3, 4, 16])
def test_write_rows_partition_the_batch(size: int) -> None:
    """dcp/test_dcp_owner_write.py."""
    first = PAGE * size  # the allocator hands out no slot of page 0
    batches = {
        "whole pages": torch.arange(first, first + 8 * size),
        "from within a page": torch.arange(first + 3, first + 3 + 5 * size),
        "two runs": torch.cat(
            [torch.arange(first, first + size + 1), torch.arange(5 * size, 6 * size + 2)]
        ),
        "one token": torch.tensor([first + 1]),
        "nothing": torch.empty(0, dtype=torch.int64),
    }
    for name, slots in batches.items():
        kept = torch.zeros(len(slots), dtype=torch.int64)
        values = torch.rand(len(slots), 3)
        for rank in range(size):
            rows = KVShard(size, rank).write_rows(slots, PAGE)
            own = slots % size == rank
            kept += own
            assert torch.equal(rows[own], slots[own] // size)
            assert (rows[own] >= PAGE).all()
            assert ((rows[~own] >= 0) & (rows[~own] < PAGE)).all()
            if name == "whole pages":
                assert own.sum() == 8
            # Written whole, with foreign tokens on the scratch page, or written filtered: the same.
            whole, filtered = torch.full((2, 64, 3), math.nan)
            whole[rows], filtered[rows[own]] = values, values[own]
            torch.testing.assert_close(
                whole[PAGE:], filtered[PAGE:], rtol=0, atol=0, equal_nan=True
            )
        assert (kept == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["gqa", "mla", "mla, joined rows"])
@pytest.mark.parametrize("size", [2, 4])
def test_pool_keeps_what_is_read_back(size: int, kind: str, dtype: torch.dtype) -> None:
    """dcp/test_triton_mla_dcp_unit.py: widened slots, most of them beyond the pool's own rows."""
    slots = Slots(size, page_size=1, pages=64)
    widened = torch.tensor(slots.extend(0, 23) + slots.extend(1, 18))
    assert widened.max() >= slots.rows
    common = {"size": slots.rows - 1, "page_size": 1, "dtype": dtype, "layer_num": 1}
    common |= {"device": "cpu", "enable_memory_saver": False}
    # Exact in fp8 too.
    k = torch.randint(-8, 9, (len(widened), 1 if "mla" in kind else 2, 24)).to(dtype)
    for shard in (KVShard(size, rank) for rank in range(size)):
        pool: Any
        with as_rank(shard):
            if kind == "gqa":
                pool = MHATokenToKVPool(head_num=2, head_dim=24, **common)
                rows = KVWriteLoc(shard.write_rows(widened, page_size=1))
                pool.set_kv_buffer(LAYER, rows, k, k, None, None)
            else:
                pool = MLATokenToKVPool(kv_lora_rank=16, qk_rope_head_dim=8, **common)
                if kind == "mla":
                    pool.set_mla_kv_buffer(LAYER, KVWriteLoc(widened), k[..., :16], k[..., 16:])
                else:
                    original = MLATokenToKVPool.set_kv_buffer
                    mla_set_kv_buffer(original, pool, LAYER, KVWriteLoc(widened), k, None)
        for request in slots.of:
            prefix = torch.tensor(slots.of[request])
            written = k[torch.isin(widened, prefix)][shard.rank :: size]
            read = pool.get_key_buffer(0)[shard.read_rows(prefix)]
            assert torch.equal(read.view(torch.uint8), written.view(torch.uint8))


def test_allocated_slots_fit_the_rows_of_every_rank() -> None:
    """dcp/test_dcp_layout_unit.py: an allocator K times as large over a pool of its own size."""
    size, page, rows = 4, 64, 1024
    allocator = PagedTokenToKVPoolAllocator(
        rows * size, page * size, torch.bfloat16, "cpu", kvcache=SimpleNamespace(), need_sort=False
    )
    slots = torch.cat([allocator.alloc(page * size) for _ in range(rows // page)])
    assert allocator.alloc(page * size) is None
    for rank in range(size):
        own = slots[slots % size == rank]
        kept = KVShard(size, rank).write_rows(own, page)
        assert len(kept.unique()) == len(kept) == rows
        assert page <= kept.min() <= kept.max() < rows + page


# --- heads --------------------------------------------------------------------------------------


def test_groups_are_consecutive_and_places_count_up() -> None:
    """dcp/test_dcp_attn_comm_unit.py."""
    assert Layout(8, 2).kvp_groups(8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Layout(8, 8).kvp_groups(8) == [list(range(8))]
    assert Layout(4, 2).kvp_groups(8) == [[0, 1], [2, 3], [4, 5], [6, 7]]  # two pipeline stages
    for size in (1, 2, 4, 8):
        layout = Layout(8, size)
        for group in layout.kvp_groups(8):
            assert [layout.kvp_rank(rank) for rank in group] == list(range(size))
            assert len({layout.attn_shard(rank) for rank in group}) == 1


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_rank_ends_with_the_heads_of_its_output_projection(size: int) -> None:
    """dcp/test_dcp_attn_comm_unit.py: widened heads, narrowed to one rank's own."""
    tp_size, heads = 8, 32
    layout, own = Layout(tp_size, size), heads // tp_size
    everyone = torch.arange(heads, dtype=torch.float32)

    def on_rank(place: int, group: ThreadGroup, shard: int) -> list[torch.Tensor]:
        width = own * size
        mine = everyone[shard * width : (shard + 1) * width].view(1, -1, 1).expand(2, -1, 8)
        lse = torch.zeros(2, width)
        return [exchange(mine, lse, group)[0] for exchange in (a2a, ag_rs)]

    for group in layout.kvp_groups(tp_size):
        results = run_threads(on_rank, size, layout.attn_shard(group[0]))
        for rank, outs in zip(group, results, strict=True):
            wanted = everyone[rank * own : (rank + 1) * own].view(1, -1, 1).expand(2, -1, 8)
            for out in outs:
                torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("dcp_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("total", [1, 2, 4, 8, 16])
def test_kv_heads_per_rank(total: int, dcp_size: int) -> None:
    """dcp/test_dcp_layout_unit.py."""
    config = SimpleNamespace(get_total_num_kv_heads=lambda: total, is_draft_model=False)
    heads = ModelConfig.get_num_kv_heads(config, 16, dcp_size=dcp_size)
    assert heads == Layout(16, dcp_size).kv_heads(total)


@pytest.mark.parametrize("queries", [False, True])
def test_qkv_shards_are_replicated_in_a_group(
    queries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dcp/test_dcp_layout_unit.py, through the series' construction scope."""
    original = QKVParallelLinear.__init__
    monkeypatch.setattr(
        QKVParallelLinear,
        "__init__",
        lambda *args, **kwargs: qkv_parallel_linear_init(original, *args, **kwargs),
    )
    # 8 query heads and 2 key-value heads of size 2, over 4 ranks of which 2 share heads.
    weights = {"q": torch.rand(16, 4), "k": torch.rand(4, 4), "v": torch.rand(4, 4)}
    for rank in range(4):
        with (
            get_parallel().override(tp_rank=rank, tp_size=4, tp_group=None),
            heads_shared_by(2, (8, 2), queries=queries),
        ):
            layer = QKVParallelLinear(4, 2, 8, 2, bias=False, params_dtype=torch.float32)
            for name, weight in weights.items():
                layer.weight_loader(layer.weight, weight, name)
        shares = {"q": 2 if queries else 4, "k": 2, "v": 2}
        wanted = [w.chunk(shares[name])[rank * shares[name] // 4] for name, w in weights.items()]
        assert torch.equal(layer.weight, torch.cat(wanted))


def test_a_chunk_attends_the_kv_heads_of_its_global_query_heads() -> None:
    """dcp/test_dcp_layout_unit.py: ranks 0 and 1 of 4 belong to the first of two heads."""
    q, k = torch.zeros(1, 2, 2), torch.tensor([[[0.0, 1.0], [10.0, 11.0]]])
    for rank, head in enumerate([0, 0, 1, 1]):
        backend = SimpleNamespace(shard=KVShard(4, rank))
        own_k, own_v = ShardedAttention._own_kv_heads(backend, q, k, k + 100)
        assert torch.equal(own_k, k[:, head : head + 1])
        assert torch.equal(own_v, k[:, head : head + 1] + 100)


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base2", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 8, 64), (4, 8, 16, 128), (8, 4, 8, 128), (8, 4, 8, 512), (2, 64, 16, 128)],
    ids=str,
)
def test_combine_is_the_reference_that_sglang_ships(
    shape: tuple[int, int, int, int], base2: bool
) -> None:
    """kernels/test_dcp_lse_combine.py, and the pack and unpack of dcp/test_dcp_fi_a2a_reshape.py.

    Poisoned outputs are for layers/dcp/test_lse_combine.py: the reference does not mask them.
    """
    N, _, _, D = shape
    generator = torch.Generator().manual_seed(N)
    partials = torch.randn(shape, generator=generator)
    lse = torch.randn(shape[:-1], generator=generator) * (5 if base2 else 1)
    lse[0, 0], lse[1, 1], lse[0, 2] = math.nan, INF, -INF
    wanted = lse_weighted_combine_cpu(partials, lse, is_lse_base_on_e=not base2)
    got, got_lse = combine(partials, lse, base2=base2, return_lse=True)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert got_lse.isfinite().all()
    other = combine(partials, lse, base2=not base2)
    assert not torch.allclose(got, other, atol=1e-3)

    # As rank 0 of N sends it, every rank being alike: heads of the group, n after n.
    by_head = partials.movedim(0, 1).flatten(1, 2), lse.movedim(0, 1).flatten(1, 2)
    sent_partials, sent_lse = unpack(pack(*by_head, N), D, partials.dtype)
    assert torch.equal(sent_partials, partials)
    assert torch.equal(sent_lse, lse.masked_fill(~lse.isfinite(), -INF))
    assert torch.equal(combine(sent_partials, sent_lse, base2=base2), got)


def test_special_weights() -> None:
    """kernels/test_dcp_lse_combine.py."""
    partials = torch.randn(2, 1, 1, 64)
    equal = combine(partials, torch.full((2, 1, 1), 5.0))
    torch.testing.assert_close(equal, partials.mean(0))
    dominant = combine(partials, torch.tensor([100.0, -100.0]).view(2, 1, 1))
    torch.testing.assert_close(dominant, partials[0])
    single = combine(partials[:1], torch.randn(1, 1, 1))
    assert torch.equal(single, partials[0])
    # ln 2 and ln 8: 8 / 10 of the weight.
    lses = torch.tensor([2.0, 8.0]).log().view(2, 1, 1)
    scaled, total = rescale(torch.full((1, 1, 1), 10.0, dtype=torch.bfloat16), lses, 1)
    torch.testing.assert_close(scaled, torch.full((1, 1, 1), 8.0))
    torch.testing.assert_close(total, torch.tensor([[math.log(10.0)]]))


def test_backends_whose_lse_is_natural() -> None:
    """kernels/test_dcp_lse_combine.py, dcp/test_dcp_attn_comm_unit.py."""
    natural = {record.name for record in ADAPTERS if is_mla_dcp_lse_base_on_e(record.name)}
    assert natural & {"fa3", "flashmla", "cutedsl_mla"} >= {"cutedsl_mla"}
    assert not natural & {"flashinfer", "trtllm_mla"}
    for unknown in ("tokenspeed_mla", None):  # upstream reads an LSE of those as base 2
        with pytest.raises(KeyError):
            is_mla_dcp_lse_base_on_e(unknown)


def exchanged(
    rank: int, group: ThreadGroup, partials: torch.Tensor, lses: torch.Tensor
) -> list[torch.Tensor]:
    return [exchange(partials[rank], lses[rank], group)[0] for exchange in (a2a, ag_rs)]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("shape", [(4, 2, 64), (16, 4, 128), (128, 8, 128), (3, 1, 512)], ids=str)
def test_both_exchanges_give_the_same(size: int, shape: tuple[int, int, int]) -> None:
    """dcp/test_dcp_mha_combine_backends.py, dcp/test_reduce_scatter_along_dim.py."""
    tokens, own, D = shape
    generator = torch.Generator().manual_seed(1234)
    partials = torch.randn(size, tokens, own * size, D, generator=generator)
    lses = 3 * torch.randn(size, tokens, own * size, generator=generator)
    whole = lse_weighted_combine_cpu(partials, lses)
    for rank, outs in enumerate(run_threads(exchanged, size, partials, lses)):
        for out in outs:
            assert out.shape == shape
            torch.testing.assert_close(
                out, whole[:, rank * own : (rank + 1) * own], rtol=1e-5, atol=1e-5
            )


def merged(
    rank: int, group: ThreadGroup, partials: torch.Tensor, lses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = cp_lse_ag_out_rs_mha(partials[rank], lses[rank], group, return_lse=True)
    assert isinstance(lse, torch.Tensor)
    return out, lse


def test_empty_shards_in_the_merge() -> None:
    """dcp/test_dcp_mha_lse_merge_unit.py.

    With one difference: upstream zeroes whatever is not finite. Here that is so where the LSE says
    that a shard is empty; a number that attention got wrong stays to be seen.
    """
    size, tokens, own, D = 4, 5, 2, 7
    partials = torch.randn(size, tokens, own * size, D)
    lses = torch.randn(size, tokens, own * size)
    lses[:, 1], lses[2, 2] = -INF, -INF
    partials[:, 1], partials[2, 2] = math.nan, INF
    before = partials.clone()
    present = torch.where(lses.isfinite()[..., None], partials, 0)
    whole = (present * lses.softmax(0).nan_to_num(0)[..., None]).sum(0)
    for rank, (out, lse) in enumerate(run_threads(merged, size, partials, lses)):
        heads = slice(rank * own, (rank + 1) * own)
        torch.testing.assert_close(out, whole[:, heads])
        torch.testing.assert_close(lse, lses.logsumexp(0)[:, heads])
        assert (out[1] == 0).all()
        assert (lse[1] == -INF).all()
    assert torch.equal(partials.nan_to_num(-1), before.nan_to_num(-1))  # inputs are left alone
