"""How many splits decode takes: the number by brute force, its bounds, and the memory it takes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from sglang_helix.srt.layers.attention.kv_splits import BLOCK, GQA, MLA, Scratch, SplitPlan, Tile
from srt.fresh import Fresh
from srt.interpreter import DEVICE, kernels, passes, without_a_gpu

H200 = {"multiprocessors": 132, "local_context": 1 << 17}
# Heads on key-value heads of a rank, as they come under sharded caches, and the tuning.
SHAPES = [(64, 8, GQA), (32, 4, GQA), (16, 1, GQA), (8, 1, GQA), (8, 8, GQA), (128, 1, MLA)]


@without_a_gpu
def test_interpreter(interpreted: Fresh) -> None:
    passes(interpreted, __file__, "-m", "gpu")


def plan_of(heads: int, kv_heads: int, tuning: object, cap: int | None = None) -> SplitPlan:
    return SplitPlan.of(tuning, heads, kv_heads, **H200, cap=cap)


def written(length: int, count: int) -> int:
    """Splits that upstream's kernel gives tokens to, by walking over them."""
    share = math.ceil(math.ceil(length / count) / BLOCK) * BLOCK
    return len(range(0, length, share)) if share else 0


@kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cap", [None, 8, 3])
def test_counts_fill_the_device_and_no_more(cap: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches = [[1], [0], [1 << 17], [4096], [0, 0, 1, 33], [1 << 17, *[100] * 31]]
    batches += [torch.randint(0, 1 << 14, (n,)).tolist() for n in (3, 8, 32, 200)]
    for heads, kv_heads, tuning in SHAPES:
        plan = plan_of(heads, kv_heads, tuning, cap)
        for lens in batches:
            counts = torch.full((len(lens) + 1,), -7, dtype=torch.int32, device=DEVICE)
            plan.count(torch.tensor(lens, dtype=dtype, device=DEVICE), counts[:-1])
            *found, beyond = counts.tolist()
            assert beyond == -7
            most = plan.capacity(len(lens))
            assert all(1 <= count <= most for count in found)
            # Every split that is counted is written, so that what is read was.
            assert [written(n, c) for n, c in zip(lens, found, strict=True)] == [
                c if n else 0 for n, c in zip(lens, found, strict=True)
            ]
            share = max(plan.least, math.ceil(sum(lens) * plan.tiles / plan.programs))
            for length, count in zip(lens, found, strict=True):
                wanted = max(share, math.ceil(length / most))
                assert count == max(1, math.ceil(length / (math.ceil(wanted / BLOCK) * BLOCK)))
            programs = plan.tiles * sum(found)
            assert programs <= plan.programs + plan.tiles * len(lens)


def test_splits_of_one_long_request() -> None:
    """Enough to fill the device; SGLang's 8 leave it with 8 to 64 programs of 132 SMs."""
    alone = {shape[:2]: plan_of(*shape).capacity(1) for shape in SHAPES}
    assert alone == {
        (64, 8): 264,
        (32, 4): 512,
        (16, 1): 512,
        (8, 1): 512,
        (8, 8): 264,
        (128, 1): 66,
    }


@pytest.mark.parametrize(("asked", "splits"), [(1, 1), (3, 3), (64, 64), (1000, 264)])
def test_what_the_user_asked_for_is_a_cap(asked: int, splits: int) -> None:
    plan = plan_of(64, 8, GQA, asked)
    assert plan.capacity(1) == splits
    assert all(plan.capacity(batch) <= splits for batch in range(1, 500))


def test_a_short_context_needs_few_splits() -> None:
    plan = SplitPlan.of(GQA, 16, 1, multiprocessors=132, local_context=1000)
    assert plan.capacity(1) == math.ceil(1000 / GQA.least_tokens)
    assert SplitPlan.of(GQA, 16, 1, multiprocessors=0, local_context=1).capacity(1) == 1


def test_memory_is_bounded_whatever_the_batch() -> None:
    """Upstream's buffers of DeepSeek-V3 over 8 ranks: 10, 16 and 32 GiB, for the same batches."""
    mla = plan_of(128, 1, MLA)
    sizes = [mla.nbytes(batch, 512, 0) / 2**30 for batch in (160, 256, 512)]
    assert sizes == pytest.approx([0.157, 0.251, 0.501], rel=0.01)
    for heads, kv_heads, tuning in SHAPES[:-1]:
        assert plan_of(heads, kv_heads, tuning).nbytes(512, 128, 0) < 80 << 20
    rows = 160 * (1 << 17)
    assert mla.nbytes(160, 512, rows) - mla.nbytes(160, 512, 0) == 8 * rows


def test_batches_share_memory_and_a_larger_one_has_its_own() -> None:
    plan = SplitPlan(4, 1, 32, 32, 6, Tile())
    scratch = Scratch(plan, 3, 16, 5, "cpu")
    assert len(scratch.indices) == 5
    for batch in (1, 2, 3):
        out, lse = scratch.of(batch, 4, 16)
        assert out.shape == (batch, 4, plan.capacity(batch), 16)
        assert lse.shape == out.shape[:-1]
        # The kernel finds the LSE of a row by dividing the row's place by its width.
        assert [stride // 16 for stride in out.stride()[:-1]] == list(lse.stride())
        assert out.data_ptr() == scratch.out.data_ptr()
        assert lse.data_ptr() == scratch.lse.data_ptr()
        assert scratch.of(batch, 4, 8)[0].data_ptr() == scratch.out.data_ptr()
    out, lse = scratch.of(40, 4, 16)
    assert out.shape == (40, 4, plan.capacity(40), 16)
    assert out.data_ptr() != scratch.out.data_ptr()
