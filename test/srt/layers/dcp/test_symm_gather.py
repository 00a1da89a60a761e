"""The one-kernel gather of queries, bit for bit: one suite for the interpreter and for CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang_helix.srt.layers.dcp import symm_launch
from sglang_helix.srt.layers.dcp.symm_layout import QueryLayout
from srt.fresh import Fresh
from srt.interpreter import DEVICE, kernels, passes, without_a_gpu
from srt.layers.dcp.symm_ranks import QueryRanks

BITS = {2: torch.int16, 4: torch.int32}
GQA, MLA = (128,), (512, 64)


@without_a_gpu
def test_interpreter(interpreted: Fresh) -> None:
    passes(interpreted, __file__)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(BITS[x.element_size()])


def anything(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits, NaNs and negative zeros too; but for words of ones, which no test may draw."""
    whole = torch.iinfo(BITS[dtype.itemsize])
    drawn = torch.randint(whole.min, -1, shape, dtype=BITS[dtype.itemsize], device=DEVICE)
    return torch.where(torch.rand(shape, device=DEVICE) < 0.5, drawn, ~drawn).view(dtype)


def queries(layout: QueryLayout, T: int) -> tuple[torch.Tensor, ...]:
    """Of all ranks, as a model leaves them: no part is contiguous."""
    N, own, dtype = layout.ranks, layout.owned, layout.wire
    if len(layout.widths) == 1:  # in a row with keys and values
        [width] = layout.widths
        rows = anything(N * T, (own + 4) * width, dtype=dtype)
        return (rows[:, : own * width].unflatten(1, (own, width)),)
    latent, rope = layout.widths  # the absorbing product's, and the end of a query
    return (
        anything(own, N * T, latent, dtype=dtype).transpose(0, 1),
        anything(N * T, own, 128 + rope, dtype=dtype)[..., 128:],
    )


def gathered(parts: tuple[torch.Tensor, ...], ranks: int) -> torch.Tensor:
    """What the collective leaves on every rank."""
    whole = torch.cat(parts, dim=-1)
    return torch.cat(list(whole.unflatten(0, (ranks, -1))), dim=1)


def check(results: list[torch.Tensor], parts: tuple[torch.Tensor, ...]) -> None:
    want = gathered(parts, len(results))
    for got in results:
        assert got.dtype == want.dtype
        assert got.is_contiguous()
        assert torch.equal(bits(got), bits(want))


@kernels
@pytest.mark.parametrize(
    ("ranks", "own", "widths", "dtype"),
    [
        (2, 2, GQA, torch.float16),
        (3, 1, (80,), torch.bfloat16),
        (4, 2, (192,), torch.bfloat16),
        (8, 1, GQA, torch.float32),
        (2, 2, MLA, torch.bfloat16),
        (3, 2, (64, 16), torch.float32),
    ],
)
def test_every_bit_of_every_rank(
    ranks: int, own: int, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Calls of all sizes, none, and more rows than programs; each slot is used again."""
    layout = QueryLayout(ranks, ranks * own, widths, dtype, max_tokens=3)
    world = QueryRanks(layout, DEVICE, warps=3 if DEVICE == "cpu" else None)
    for T in (1, 3, 0, 2, 1):
        parts = queries(layout, T)
        check(world(*parts), parts)


@kernels
@pytest.mark.parametrize(("ranks", "widths"), [(2, MLA), (3, (16,)), (4, (64, 16))])
def test_ranks_out_of_step(ranks: int, widths: tuple[int, ...]) -> None:
    """A rank may be a call ahead of another, whose slot it must not touch."""
    layout = QueryLayout(ranks, 2 * ranks, widths, torch.bfloat16, max_tokens=2)
    world = QueryRanks(layout, DEVICE, warps=3, seed=ranks)
    calls = [queries(layout, T) for T in (2, 1, 0, 2, 2, 1, 2)]
    for results, parts in zip(world.queries_out_of_step(calls), calls, strict=True):
        check(results, parts)


@kernels
def test_a_word_of_ones_arrives_as_the_nan_below_it() -> None:
    layout = QueryLayout(2, 4, (128,), torch.bfloat16, max_tokens=2)
    world = QueryRanks(layout, DEVICE)
    for _ in range(3):
        x = torch.zeros(4, 2, 128, dtype=torch.bfloat16, device=DEVICE)
        x.view(torch.int16)[1, 1, 6:9] = -1  # a word, and half of the next
        for got in world(x):
            found = bits(got)[1, 1].tolist()
            assert found[6:9] == [-2, -1, -1]
            assert got[1, 1, 6:9].isnan().all()
            assert int(got.isnan().sum()) == 3


@kernels
def test_queries_that_are_not_aligned_are_copied() -> None:
    layout = QueryLayout(2, 4, MLA, torch.bfloat16, max_tokens=3)
    latent = anything(6, 2, 512, dtype=torch.bfloat16)
    rope = anything(6, 2, 65, dtype=torch.bfloat16)[..., 1:]
    check(QueryRanks(layout, DEVICE)(latent, rope), (latent, rope))


@kernels
def test_an_empty_batch_launches_nothing_and_epochs_stand_still() -> None:
    layout = QueryLayout(2, 4, GQA, torch.bfloat16, max_tokens=3)
    world = QueryRanks(layout, DEVICE)
    before = world.together.epochs.clone()
    assert [tuple(got.shape) for got in world(*queries(layout, 0))] == [(0, 4, 128)] * 2
    assert torch.equal(world.together.epochs, before)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((2, 3, 128), torch.bfloat16, ValueError, r"must be \[\(2, 2, 128\)\], got"),
        ((2, 2, 64), torch.bfloat16, ValueError, r"must be \[\(2, 2, 128\)\], got"),
        ((4, 2, 128), torch.bfloat16, ValueError, "at most 3 tokens per call and got 4"),
        ((2, 2, 128), torch.float16, TypeError, r"expected torch\.bfloat16, got"),
    ],
)
def test_queries_that_do_not_fit_are_refused(
    shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], message: str
) -> None:
    layout = QueryLayout(2, 4, GQA, torch.bfloat16, max_tokens=3)
    workspace = QueryRanks(layout, "cpu").apart[0]
    with pytest.raises(error, match=message):
        symm_launch.gather(workspace, [torch.empty(shape, dtype=dtype)])


@pytest.mark.parametrize(
    ("heads", "widths", "dtype", "error", "message"),
    [
        (5, (128,), torch.bfloat16, ValueError, "1 of 5 heads from 2 ranks"),
        (4, (128, 64, 8), torch.bfloat16, ValueError, "3 of 4 heads from 2 ranks"),
        (4, (512, 4), torch.bfloat16, ValueError, "not whole 16-byte vectors"),
        (4, (128,), torch.float8_e4m3fn, TypeError, "not torch.float8_e4m3fn"),
    ],
)
def test_what_the_gather_is_not_made_for_is_refused(
    heads: int, widths: tuple[int, ...], dtype: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        QueryLayout(2, heads, widths, dtype, max_tokens=3)


def test_memory_is_two_slots_of_all_queries() -> None:
    layout = QueryLayout(4, 128, MLA, torch.bfloat16, max_tokens=256)
    assert layout.nbytes == 2 * 256 * 128 * 576 * 2
    assert (layout.rows_per_token, layout.words) == (32, (256, 32))
