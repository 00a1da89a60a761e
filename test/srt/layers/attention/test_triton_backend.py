"""What the Triton adapter prepares; its kernels run in test_symm_exchange.py and on servers."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.server_args import ServerArgs
from sglang_helix.srt.layers.attention import triton_backend
from sglang_helix.srt.layers.attention.kv_splits import Scratch, SplitPlan, Tile
from sglang_helix.srt.layers.attention.triton_backend import ShardedTritonAttnBackend
from sglang_helix.srt.layers.dcp.ownership import KVShard

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


def test_a_padded_replay_writes_no_row_of_an_earlier_one(
    backend: ShardedTritonAttnBackend,
) -> None:
    prepare(backend, [0, 0, 0, 0], 4, capture=True)
    captured = backend.write_rows
    prepare(backend, [101, 201, 301, 401], 4, capture=False)
    assert captured is not None
    assert captured.tolist() == [50, 100, 150, 200]
    # Two requests are left; the graph of four is replayed with their slots only.
    prepare(backend, [103, 205], 4, capture=False)
    assert captured[:2].tolist() == [51, 102]
    assert captured[2:].max() < backend.pool_page_size


@pytest.mark.parametrize("windows", [True, False])
def test_a_window_has_all_of_its_keys_at_decode(
    backend: ShardedTritonAttnBackend, windows: bool
) -> None:
    """Upstream lists as many rows as the first key lies back; an extend has its own besides."""
    backend.windows, backend.sliding_window_size = windows, 15
    seen = []

    def upstream(adapter: ShardedTritonAttnBackend, *args: Any) -> None:
        seen.append(adapter.sliding_window_size)

    batch = SimpleNamespace(
        batch_size=1,
        seq_lens_sum=1,
        extend_prefix_lens_cpu=[4],
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
    batch = SimpleNamespace(forward_mode=mode, **{"batch_size": 3, **known})
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
        mock.patch.object(triton_backend.ShardedAttention, "init_forward_metadata", upstream),
    ):
        backend.init_forward_metadata(batch)
    (indices,) = found
    assert (len(indices), indices.dtype) == (rows, torch.int64)


class Runner:
    """DeepSeek-V3 or a GQA model on one of 8 ranks of one KVP group, on an H200."""

    device, gpu_id, pre_model_load_memory = "cpu", 0, 139.0

    def __init__(self, mla: bool) -> None:
        self.use_mla_backend = mla
        self.model = torch.nn.ModuleList(
            RadixAttention(8, 64, 1.0, num_kv_heads=8, layer_id=0, v_head_dim=width)
            for width in (64, 128)
        )
        self.model_config = SimpleNamespace(
            context_len=1 << 20,
            kv_lora_rank=512,
            get_max_num_attention_heads=lambda: 128 if mla else 64,
        )


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    kernel = SimpleNamespace(
        triton_attention_num_kv_splits=8, triton_attention_split_tile_size=None
    )
    bags = {
        "get_exec": SimpleNamespace(kernel=kernel),
        "get_parallel": SimpleNamespace(tp_size=8, attn_dcp_size=8),
        "get_schedule": SimpleNamespace(mem_fraction_static=0.9),
        "get_device_core_count": 132,
    }
    for name, bag in bags.items():
        monkeypatch.setattr(triton_backend, name, lambda *_, bag=bag: bag)
    monkeypatch.setattr(triton_backend, "get_available_gpu_memory", lambda *_: 40.0)
    monkeypatch.setattr(triton_backend, "Scratch", lambda *args: args)
    return kernel


def test_prepared_for_the_heads_of_the_group_and_a_ranks_share(kernel: Any) -> None:
    plan, largest, width, rows, device = triton_backend.prepare(Runner(mla=True), 160, 256)
    assert (plan.heads, plan.kv_heads, plan.most) == (128, 1, 512)
    assert (largest, width, rows, device) == (256, 512, 160 << 17, "cpu")
    plan, _, width, rows, _ = triton_backend.prepare(Runner(mla=False), 0, 1)
    assert (plan.heads, plan.kv_heads, width, rows) == (64, 8, 128, 0)


@pytest.mark.parametrize(
    ("asked", "tile", "most"), [(8, None, 512), (4, None, 4), (64, None, 64), (8, 4096, 32)]
)
def test_flags_cap_the_splits(kernel: Any, asked: int, tile: int | None, most: int) -> None:
    kernel.triton_attention_num_kv_splits = asked
    kernel.triton_attention_split_tile_size = tile
    assert triton_backend.prepare(Runner(mla=False), 0, 1)[0].most == most


def test_the_default_that_means_nothing_was_asked_for() -> None:
    assert ServerArgs(model_path="-").triton_attention_num_kv_splits == triton_backend.NOT_ASKED


def test_what_does_not_fit_beside_the_weights_is_refused(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14.3 GiB are free, 13.9 of them for what is not the pool's."""
    monkeypatch.setattr(triton_backend, "get_available_gpu_memory", lambda *_: 14.3)
    triton_backend.prepare(Runner(mla=True), 160, 160)
    said = "triton: .* of up to 256 take 0.50 GiB.* leave 0.40 GiB .*--cuda-graph-max-bs-decode"
    with pytest.raises(ValueError, match=said):
        triton_backend.prepare(Runner(mla=True), 256, 256)
