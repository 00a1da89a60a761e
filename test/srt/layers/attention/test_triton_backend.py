"""What the Triton adapter prepares for captured graphs; its kernels run in test_end_to_end.py."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
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
    adapter.cuda_graph_attn_lse = torch.zeros(8, 4, 2)
    adapter.allocate_captured_writes(8)
    return adapter


def prepare(adapter: ShardedTritonAttnBackend, slots: list[int], batch: int, capture: bool) -> None:
    view = SimpleNamespace(out_cache_loc=torch.tensor(slots), batch_size=batch)
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


def test_splits_that_no_kernel_writes_count_as_empty(backend: ShardedTritonAttnBackend) -> None:
    prepare(backend, [33], 1, capture=False)
    assert torch.isneginf(backend.cuda_graph_attn_lse[:1]).all()
    assert not backend.cuda_graph_attn_lse[1:].any(), "rows of larger graphs are not touched"
