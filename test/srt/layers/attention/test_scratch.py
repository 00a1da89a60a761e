"""Memory that Triton's decode is given before the pool is sized: for which heads, and how much."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.server_args import ServerArgs
from sglang_helix.srt.layers.attention import kv_splits

pytestmark = pytest.mark.quick


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
            hf_text_config=None,
            is_hybrid_swa=False,
        )


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    kernel = SimpleNamespace(
        triton_attention_num_kv_splits=8, triton_attention_split_tile_size=None
    )
    bags = {
        "get_exec": SimpleNamespace(kernel=kernel),
        "get_parallel": SimpleNamespace(attn_tp_size=8, attn_dcp_size=8),
        "get_schedule": SimpleNamespace(mem_fraction_static=0.9),
        "get_spec": SimpleNamespace(speculative_num_draft_tokens=None),
        "get_device_core_count": 132,
    }
    for name, bag in bags.items():
        monkeypatch.setattr(kv_splits, name, lambda *_, bag=bag: bag)
    monkeypatch.setattr(kv_splits, "get_available_gpu_memory", lambda *_: 40.0)
    monkeypatch.setattr(kv_splits, "Scratch", lambda *args: args)
    return kernel


def test_prepared_for_the_heads_of_the_group_and_a_ranks_share(kernel: Any) -> None:
    plan, largest, width, rows, device = kv_splits.prepare(Runner(mla=True), 160, 256)
    assert (plan.heads, plan.kv_heads, plan.most) == (128, 1, 512)
    assert (largest, width, rows, device) == (256, 512, 160 << 17, "cpu")
    plan, _, width, rows, _ = kv_splits.prepare(Runner(mla=False), 0, 1)
    assert (plan.heads, plan.kv_heads, width, rows) == (64, 8, 128, 0)


@pytest.mark.parametrize(
    ("mla", "drafts", "heads"),
    [
        *((True, 4, 4 * 128), (True, 3, 3 * 128)),
        # 8 heads on each key-value head: 3 drafts of each are no whole tiles of decode's kernel.
        *((False, 4, 4 * 64), (False, 2, 2 * 64), (False, 3, 64)),
    ],
)
def test_drafts_are_prepared_for_where_they_are_heads(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, mla: bool, drafts: int, heads: int
) -> None:
    spec = SimpleNamespace(speculative_num_draft_tokens=drafts)
    monkeypatch.setattr(kv_splits, "get_spec", lambda: spec)
    plan, *_ = kv_splits.prepare(Runner(mla=mla), 160, 200)
    assert (plan.heads, plan.kv_heads) == (heads, 1 if mla else 8)


@pytest.mark.parametrize(
    ("asked", "tile", "most"), [(8, None, 512), (4, None, 4), (64, None, 64), (8, 4096, 32)]
)
def test_flags_cap_the_splits(kernel: Any, asked: int, tile: int | None, most: int) -> None:
    kernel.triton_attention_num_kv_splits = asked
    kernel.triton_attention_split_tile_size = tile
    assert kv_splits.prepare(Runner(mla=False), 0, 1)[0].most == most


def test_the_default_that_means_nothing_was_asked_for() -> None:
    assert ServerArgs(model_path="-").triton_attention_num_kv_splits == kv_splits.NOT_ASKED


def test_what_does_not_fit_beside_the_weights_is_refused(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14.3 GiB are free, 13.9 of them for what is not the pool's."""
    monkeypatch.setattr(kv_splits, "get_available_gpu_memory", lambda *_: 14.3)
    kv_splits.prepare(Runner(mla=True), 160, 160)
    said = "triton: .* of up to 256 take 0.50 GiB.* leave 0.40 GiB .*--cuda-graph-max-bs-decode"
    with pytest.raises(ValueError, match=said):
        kv_splits.prepare(Runner(mla=True), 256, 256)
