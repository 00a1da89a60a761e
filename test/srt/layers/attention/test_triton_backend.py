"""What the Triton adapter prepares; its kernels run in test_symm_exchange.py and on servers."""

from itertools import accumulate
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_helix.srt.layers.attention import triton_backend, triton_rows
from sglang_helix.srt.layers.attention.kv_splits import Scratch, SplitPlan, Tile
from sglang_helix.srt.layers.attention.triton_backend import ShardedTritonAttnBackend
from sglang_helix.srt.layers.dcp import comm, lse_combine, lse_combine_triton, packed_rows
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.layers.attention.conformance import as_captured
from srt.layers.attention.launches import Launches

pytestmark = pytest.mark.quick


@pytest.fixture
def backend() -> ShardedTritonAttnBackend:
    adapter = object.__new__(ShardedTritonAttnBackend)
    adapter.shard = KVShard(size=2, rank=1)
    adapter.pool_page_size = 16
    adapter.mla = False
    adapter.device = "cpu"
    adapter.max_context_len = 1000
    adapter.sliding_window_size = None
    adapter.scratch = Scratch(SplitPlan(4, 1, 32, 32, 8, Tile()), 4, 16, 40, "cpu")
    adapter.allocate_captured_writes(8)
    return adapter


def prepare(adapter: ShardedTritonAttnBackend, slots: list[int], batch: int, capture: bool) -> None:
    view = SimpleNamespace(
        out_cache_loc=torch.tensor(slots), batch_size=batch, forward_mode=ForwardMode.DECODE
    )
    with mock.patch.object(TritonAttnBackend, "init_forward_metadata_out_graph"):
        adapter.init_forward_metadata_out_graph(view, capture)
    adapter.init_forward_metadata_in_graph(as_captured(view))


def test_a_padded_replay_writes_no_row_of_an_earlier_one(
    backend: ShardedTritonAttnBackend,
) -> None:
    prepare(backend, [0, 0, 0, 0], 4, capture=True)
    prepare(backend, [101, 201, 301, 401], 4, capture=False)
    assert backend.write_rows is not None
    assert backend.write_rows.tolist() == [50, 100, 150, 200]
    # Two requests are left; the graph of four is replayed with their slots only.
    prepare(backend, [103, 205], 4, capture=False)
    assert backend.write_rows[:2].tolist() == [51, 102]
    assert backend.write_rows[2:].max() < backend.pool_page_size


@pytest.mark.parametrize("windows", [True, False])
def test_a_window_has_all_of_its_keys_at_decode(
    backend: ShardedTritonAttnBackend, windows: bool
) -> None:
    """Upstream lists as many rows as the first key lies back; an extend has its own besides."""
    backend.windows, backend.sliding_window_size = windows, 15
    backend.forward_metadata = SimpleNamespace(qo_indptr=None, kv_indptr=None)
    seen = []

    def upstream(adapter: ShardedTritonAttnBackend, *args: Any) -> None:
        seen.append(adapter.sliding_window_size)

    batch = SimpleNamespace(
        batch_size=1,
        seq_lens_sum=1,
        extend_prefix_lens_cpu=[4],
        extend_seq_lens_cpu=[1],
        out_cache_loc=torch.tensor([3]),
        forward_mode=ForwardMode.DECODE,
    )
    with (
        mock.patch.object(TritonAttnBackend, "init_forward_metadata", upstream),
        mock.patch.object(TritonAttnBackend, "init_forward_metadata_out_graph", upstream),
    ):
        backend.init_forward_metadata(batch)
        backend.init_forward_metadata_out_graph(batch)
        batch.forward_mode = ForwardMode.EXTEND
        backend.init_forward_metadata(batch)
    whole = 16 if windows else 15
    assert seen == [whole, whole, 15]
    assert backend.sliding_window_size == 15


def test_graphs_list_a_ranks_rows_in_what_was_prepared(backend: ShardedTritonAttnBackend) -> None:
    with mock.patch.object(TritonAttnBackend, "init_cuda_graph_state") as upstream:
        backend.init_cuda_graph_state(4, 4)
    upstream.assert_called_once_with(4, 4, backend.scratch.indices)


@pytest.mark.parametrize(
    ("mode", "known", "rows"),
    [
        (ForwardMode.DECODE, {"seq_lens_sum": 11}, 7),
        (ForwardMode.DECODE, {"seq_lens_sum": None}, 1501),
        (ForwardMode.EXTEND, {"extend_prefix_lens_cpu": [0, 5, 6]}, 7),
        (ForwardMode.EXTEND, {"extend_prefix_lens_cpu": None}, 1501),
        (ForwardMode.IDLE, {"seq_lens_sum": 0, "batch_size": 0}, 0),
    ],
)
def test_rows_are_counted_without_asking_the_device(
    backend: ShardedTritonAttnBackend, mode: ForwardMode, known: dict[str, Any], rows: int
) -> None:
    """Three requests on one of two ranks: at least the rows that it has, at most one more each."""
    lens = {"extend_seq_lens_cpu": [1, 1, 1]}
    batch = SimpleNamespace(forward_mode=mode, **lens, **{"batch_size": 3, **known})
    backend.forward_metadata = SimpleNamespace(
        qo_indptr=torch.arange(4), kv_indptr=torch.zeros(4, dtype=torch.int32)
    )
    found = []

    def upstream(adapter: ShardedTritonAttnBackend, forward_batch: Any) -> None:
        # A tensor without storage: to look at a length is an error.
        lens = torch.empty(3, dtype=torch.int64, device="meta")
        adapter._dcp_kv_indices(lens, lens, lens)

    with (
        mock.patch.object(TritonAttnBackend, "init_forward_metadata", upstream),
        mock.patch.object(
            TritonAttnBackend, "_dcp_kv_indices", lambda *args: found.append(args[4]) or args
        ),
        mock.patch.object(triton_rows.ShardedAttention, "init_forward_metadata", upstream),
    ):
        backend.init_forward_metadata(batch)
    (indices,) = found
    assert (len(indices), indices.dtype) == (rows, torch.int64)


RANKS, OWN = 2, 4


@pytest.mark.parametrize("prefixes", [[7, 0, 9], [0, 7, 0], [0, 0, 0]], ids=["ends", "one", "none"])
@pytest.mark.parametrize("replicated", [False, True], ids=["gathered", "replicated"])
def test_launches_of_an_extend(
    backend: ShardedTritonAttnBackend,
    monkeypatch: pytest.MonkeyPatch,
    replicated: bool,
    prefixes: list[int],
) -> None:
    """GQA, a2a: 21 a layer once, at most 9 now; who stands before or behind all prefixes is out."""
    launches, chunks = Launches(), [2, 3, 4]
    cached = {(7, 0, 9): sum(chunks), (0, 7, 0): 3, (0, 0, 0): 0}[tuple(prefixes)]
    heads = OWN * RANKS
    monkeypatch.setattr(lse_combine, "_runs_triton", lambda x: True)
    for name in ("_merge_kernel", "_pack_kernel", "_combine_kernel"):
        monkeypatch.setattr(lse_combine_triton, name, launches.kernel(name))

    class Group:
        world_size, rank_in_group = RANKS, 1

        def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
            assert (x.shape, dim, x.is_contiguous()) == ((OWN, cached, 32), 0, True)
            launches.names.append("all_gather")
            return x.new_empty(heads, cached, 32)

        def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
            row = packed_rows.packed_row_bytes(32, torch.bfloat16)
            assert input.shape == (RANKS, cached, OWN, row)
            launches.names.append("all_to_all")

    attended = []

    def attend(q: Any, k: Any, v: Any, out: Any, *rest: Any, lse_extend: Any, **kind: Any) -> None:
        assert out.dtype == q.dtype
        launches.names.append("prefix" if kind["skip_extend"] else "chunk")
        attended.append((tuple(q.shape), rest[2].tolist(), rest[3].tolist()))

    backend.heads, backend.shard, backend.kvp_group = heads, KVShard(RANKS, 1), Group()
    backend.base2, backend.use_mla = False, False
    backend.exchanger = Exchanger("a2a", backend.kvp_group)
    backend.extend_attention_fwd = attend
    backend.kv_indptr = torch.zeros(9, dtype=torch.int32)
    backend.nothing_before = torch.zeros_like(backend.kv_indptr)
    row = torch.zeros(1, 2, 32, dtype=torch.bfloat16)
    backend.token_to_kv_pool = SimpleNamespace(
        get_kv_buffer=lambda layer: (row, row),
        set_kv_buffer=lambda *args: launches.names.append("store"),
    )
    q_width, kv_width = (heads if replicated else OWN) * 32, 2 * 32
    # As the projection leaves them: queries, keys and values of a token in one row.
    qkv = torch.zeros(sum(chunks), q_width + 2 * kv_width, dtype=torch.bfloat16)
    q, k, v = qkv.split([q_width, kv_width, kv_width], dim=1)
    k, v = k.unflatten(1, (2, 32)), v.unflatten(1, (2, 32))
    layer: Any = SimpleNamespace(
        layer_id=3,
        tp_q_head_num=q_width // 32,
        tp_k_head_num=2,
        qk_head_dim=32,
        v_head_dim=32,
        scaling=1.0,
        logit_cap=0.0,
        logit_capping_method="tanh",
        xai_temperature_len=-1,
        sliding_window_size=-1,
        k_scale=None,
        v_scale=None,
    )
    local = [(length + RANKS - 2) // RANKS for length in prefixes]
    batch: Any = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        batch_size=3,
        extend_prefix_lens_cpu=prefixes,
        extend_seq_lens_cpu=chunks,
        out_cache_loc=torch.arange(sum(chunks)),
        out_cache_loc_is_physical=False,
    )
    backend.forward_metadata = SimpleNamespace(
        qo_indptr=torch.tensor([0, *accumulate(chunks)], dtype=torch.int32),
        kv_indptr=torch.tensor([0, *accumulate(local)], dtype=torch.int32),
        kv_indices=torch.zeros(sum(local), dtype=torch.int64),
        custom_mask=None,
        max_extend_len=4,
    )
    with mock.patch.object(TritonAttnBackend, "init_forward_metadata"):
        backend.init_forward_metadata(batch)
    with launches:
        out = backend.forward_extend(q, k, v, layer, batch)
    assert (out.shape, out.dtype) == ((sum(chunks), OWN * 32), torch.bfloat16)
    gather = [] if replicated else ["clone", "all_gather"]
    exchange = ["prefix", "_pack_kernel", "all_to_all", "_combine_kernel"]
    prefix = [*gather, *exchange, "store", "_merge_kernel"] if cached else ["store"]
    assert launches.names == ["chunk", *prefix]
    assert len(launches.names) <= 9
    assert attended[0] == ((sum(chunks), OWN, 32), [0, 2, 5, 9], [0, 0, 0, 0])
    queries = {0: [], 3: [0, 3], 9: [0, 2, 5, 9]}[cached]
    keys = {0: [], 3: [0, 3], 9: [0, 3, 3, 7]}[cached]
    assert attended[1:] == ([((cached, heads, 32), queries, keys)] if cached else [])


@pytest.mark.parametrize("mla", [False, True], ids=["gqa", "mla"])
def test_launches_of_a_decode_layer(
    backend: ShardedTritonAttnBackend, monkeypatch: pytest.MonkeyPatch, mla: bool
) -> None:
    """From q_proj to o_proj, or from the absorbed queries to the value projection, by a2a.

    What was gathered is attended where it is: no copy of all heads' queries.
    """
    launches, heads, tokens = Launches(), OWN * RANKS, 3
    width, rope = (512, 64) if mla else (32, 0)
    monkeypatch.setattr(lse_combine, "_runs_triton", lambda x: True)
    for name in ("_combine_splits_kernel", "_pack_kernel", "_combine_kernel"):
        monkeypatch.setattr(lse_combine_triton, name, launches.kernel(name))

    class Group:
        world_size, rank_in_group = RANKS, 1

        def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
            assert (x.shape, dim, x.is_contiguous()) == ((OWN, tokens, width + rope), 0, True)
            launches.names.append("all_gather")
            return gathered

        def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
            launches.names.append("all_to_all")

    def attend(q: torch.Tensor, *rest: Any) -> None:
        assert q.shape == (tokens, heads, width + rope)
        assert (q.data_ptr(), q.stride(-1)) == (gathered.data_ptr(), 1)
        launches.names.append("attend")

    gathered = torch.empty(heads, tokens, width + rope, dtype=torch.bfloat16)
    monkeypatch.setattr(triton_backend, "first_stage", attend)
    group: Any = Group()
    monkeypatch.setattr(comm, "get_parallel", lambda: SimpleNamespace(dcp_group=group))
    backend.heads, backend.kvp_group, backend.mla = heads, group, mla
    backend.base2, backend.use_mla = False, mla
    backend.exchanger = group.exchanger = Exchanger("a2a", group)
    backend.scratch = Scratch(SplitPlan(heads, 1, 32, 32, 8, Tile()), 4, width, 40, "cpu")
    backend.write_rows = torch.zeros(tokens, dtype=torch.int64)
    row = torch.zeros(1, 2, width + rope, dtype=torch.bfloat16)

    def store(*args: Any) -> None:
        launches.names.append("store")

    backend.token_to_kv_pool = SimpleNamespace(
        get_kv_buffer=lambda layer: (row, row[..., :width]),
        set_kv_buffer=store,
        set_mla_kv_buffer=store,
    )
    counts = torch.ones(tokens, dtype=torch.int32)
    indptr = torch.zeros(tokens + 1, dtype=torch.int32)
    backend.forward_metadata = SimpleNamespace(
        kv_indptr=indptr, kv_indices=indptr, num_kv_splits=counts
    )
    layer: Any = SimpleNamespace(
        layer_id=3,
        tp_q_head_num=heads if mla else OWN,
        tp_k_head_num=1,
        qk_head_dim=width + rope,
        v_head_dim=width,
        scaling=1.0,
        logit_cap=0.0,
        logit_capping_method="tanh",
        xai_temperature_len=-1,
        sliding_window_size=-1,
        k_scale=None,
        v_scale=None,
    )
    batch: Any = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=tokens,
        out_cache_loc=torch.arange(tokens),
        out_cache_loc_is_physical=False,
    )
    if mla:
        # As the absorbing product and the rotary embedding leave them.
        latent = torch.zeros(OWN, tokens, width, dtype=torch.bfloat16).transpose(0, 1)
        q_rope = torch.zeros(tokens, OWN, 192, dtype=torch.bfloat16)[..., 128:]
        k, k_rope = row.new_zeros(tokens, 1, width), row.new_zeros(tokens, 1, rope)
        with launches:
            parts = comm.all_gather_q_for_mla_decode(latent, q_rope)
            out, lse = backend.forward_decode(
                parts[0], k, k, layer, batch, q_rope=parts[1], k_rope=k_rope
            )
            out = comm.dcp_a2a_lse_reduce(mock.Mock(), out, lse, group)
        assert out.shape == (tokens, OWN, width)
    else:
        qkv = torch.zeros(tokens, (OWN + 2) * width, dtype=torch.bfloat16)
        q, k, v = qkv.split([OWN * width, width, width], dim=1)
        with launches:
            out = backend.forward_decode(q, k, v, layer, batch)
        assert out.shape == (tokens, OWN * width)
    gather = ["cat" if mla else "clone", "all_gather"]
    stored = [*gather, "store"] if mla else ["store", *gather]
    exchange = ["_combine_splits_kernel", "_pack_kernel", "all_to_all", "_combine_kernel"]
    assert launches.names == [*stored, "attend", *exchange]


def test_mla_makes_nothing_that_it_does_not_read(backend: ShardedTritonAttnBackend) -> None:
    """Its store finds the owners; a gathered prefix is read in order, without a list of rows."""
    backend.mla, backend.write_rows, backend.scratch_rows = True, None, None
    batch: Any = SimpleNamespace(
        out_cache_loc=torch.tensor([0, 1]), forward_mode=ForwardMode.EXTEND, batch_size=1
    )
    latent = torch.zeros(1, 1, 32)
    backend.token_to_kv_pool = SimpleNamespace(get_kv_buffer=lambda layer: (latent, latent))
    backend.forward_metadata = SimpleNamespace(
        kv_indices=torch.zeros(1), custom_mask=None, max_extend_len=2
    )
    backend.prefixes = torch.tensor([0, 2]), torch.tensor([0, 5])
    attended = []
    backend.extend_attention_fwd = lambda *args, **kind: attended.append((args, kind))
    layer: Any = SimpleNamespace(
        layer_id=0,
        qk_head_dim=32,
        v_head_dim=24,
        scaling=1.0,
        logit_cap=0.0,
        logit_capping_method="tanh",
        xai_temperature_len=-1,
        k_scale=None,
        v_scale=None,
    )
    queries, gathered = torch.zeros(2, 4, 32), torch.zeros(5, 1, 32)
    with Launches() as launches:
        backend.allocate_captured_writes(8)
        backend.prepare_writes(batch)
        backend.prepare_captured_writes(batch)
        backend.partial_prefix(queries, layer, batch, gathered)
    assert launches.names == []
    assert backend.write_rows is None
    ((args, kind),) = attended
    assert args[4] is gathered
    assert kind["identity_kv_indices"]
    assert not kind["skip_prefix"]
