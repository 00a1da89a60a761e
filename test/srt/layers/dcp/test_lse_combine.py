"""Combine, rescale and pack against float64: one suite for torch, Triton's interpreter and CUDA.

The oracle is written in float64 from the definition. Where hardware rounds fp32 to bf16 the
interpreter truncates, so results in bf16 are checked on the other two only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang_helix.srt.layers.dcp import lse_combine, packed_rows
from sglang_helix.srt.layers.dcp.partial import Partial, Splits
from srt.fresh import Fresh
from srt.interpreter import passes
from srt.layers.dcp.lse_combine_cases import (
    BOUND,
    EMPTY,
    FLOATS,
    INF,
    INTERPRETED,
    SIZES,
    Case,
    assert_close,
    assert_same_lse,
    cases,
    compiled_only,
    in_float64,
    laid_out,
    moved,
    needs_cuda,
    needs_triton,
    summands_in_float64,
)

BYTES = [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2]

generated = settings(
    max_examples=25 if torch.cuda.is_available() else 80,  # there, most examples compile a kernel
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Implementation(NamedTuple):
    device: str
    rounds_bf16: bool = True


@pytest.fixture(
    scope="module",
    params=[
        "interpreter" if INTERPRETED else "torch",
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_triton, needs_cuda]),
    ],
)
def impl(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "cuda":
        return Implementation("cuda")
    return Implementation("cpu", rounds_bf16=not INTERPRETED)


@needs_triton
@compiled_only
def test_this_file_in_the_interpreter(interpreted: Fresh) -> None:
    passes(interpreted, __file__, "-k", "[interpreter")


@generated
@given(case=cases())
def test_combine(impl: Implementation, case: Case) -> None:
    dtype = case.out_dtype or case.partials.dtype
    if dtype == torch.bfloat16 and not impl.rounds_bf16:
        dtype = torch.float32
    partials, lse = moved(case.partials, impl.device), moved(case.lse, impl.device)
    out, out_lse = lse_combine.combine(
        partials, lse, out_dtype=dtype, base2=case.base2, return_lse=True
    )
    want, want_lse = in_float64(case.partials, case.lse, case.base2)
    assert out.dtype == dtype
    assert out_lse.dtype == torch.float32
    assert_close(out, want, BOUND[dtype])
    assert_same_lse(out_lse, want_lse)
    assert torch.equal(out.cpu()[want_lse == -INF], torch.zeros_like(out.cpu()[want_lse == -INF]))
    alone = lse_combine.combine(partials, lse, out_dtype=dtype, base2=case.base2)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("base2", [False, True])
@pytest.mark.parametrize("shift", [-INF, -3.0, 90.0])
def test_a_sink_is_one_more_shard_of_no_value(
    impl: Implementation, shift: float, base2: bool
) -> None:
    partials = torch.randn(3, 4, 5, 80, device=impl.device)
    lse = 20 * torch.randn(3, 4, 5, device=impl.device)
    lse[:, 1], partials[:, 1] = -INF, math.nan  # queries of nobody's tokens
    sinks = (torch.randn(5, device=impl.device) + shift).to(torch.bfloat16)
    column = sinks.float().expand(1, 4, 5) / (math.log(2) if base2 else 1)
    want, want_lse = in_float64(
        torch.cat([partials, torch.zeros_like(partials[:1])]), torch.cat([lse, column]), base2
    )
    for shards in (partials, partials.to(torch.float16)):
        out, out_lse = lse_combine.combine(
            shards, lse, sinks=sinks, base2=base2, return_lse=True, out_dtype=torch.float32
        )
        # What is left beside a sink of 90 is e^-90 of its values: the fp32 exponent is rounded.
        lost = 90 * 2**-22 if shift == 90 else 0
        assert_close(out, want, BOUND[shards.dtype] + lost)
        assert_same_lse(out_lse, want_lse)
    with pytest.raises(ValueError, match=r"sinks must be contiguous \[5\]"):
        lse_combine.combine(partials, lse, sinks=sinks[:4])


@pytest.mark.parametrize("base2", [False, True])
@pytest.mark.parametrize(
    ("dtypes", "first", "count", "sunk"),
    [
        ((torch.float32, torch.float32), 0, 6, False),
        ((torch.float16, torch.float16), 2, 3, False),
        ((torch.float32, torch.float16), 5, 1, True),
        ((torch.bfloat16, torch.bfloat16), 0, 4, True),
        ((torch.float32, torch.float32), 3, 0, True),
    ],
)
@pytest.mark.parametrize("D", [80, 128])
def test_merge_of_two_that_lie_apart(
    impl: Implementation,
    D: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    first: int,
    count: int,
    sunk: bool,
    base2: bool,
) -> None:
    B, h, some = 6, 5, slice(first, first + count)
    outs = [torch.randn(B, h, D), torch.randn(B, h, D)]
    lses = [10 * torch.randn(B, h), 10 * torch.randn(B, h)]
    for shard, poison in enumerate((math.nan, INF)):  # of one, and in the last query of both
        lses[shard][shard], outs[shard][shard] = EMPTY[shard], poison
        lses[shard][-1], outs[shard][-1] = EMPTY[2], poison
    outs = [out.to(dtype) for out, dtype in zip(outs, dtypes, strict=True)]
    lses[1][:first], lses[1][first + count :] = -INF, -INF
    sinks = torch.randn(h).to(torch.bfloat16) if sunk else None
    shards, logs = torch.stack([out.float() for out in outs]), torch.stack(lses)
    if sinks is not None:
        column = sinks.float().expand(1, B, h) / (math.log(2) if base2 else 1)
        shards, logs = torch.cat([shards, torch.zeros_like(shards[:1])]), torch.cat([logs, column])
    want, want_lse = in_float64(shards, logs, base2)
    whole = laid_out(outs[0], [1, 0], 8, 1), laid_out(lses[0][..., None], [1, 0], 1, 1)[..., 0]
    part = laid_out(outs[1][some], [0, 1], 4, 1), lses[1][some]
    pairs = (whole, part)
    whole, part = (Partial(moved(x, impl.device), lse.to(impl.device)) for x, lse in pairs)
    sinks = None if sinks is None else sinks.to(impl.device)
    for dtype in (torch.float32, torch.float16):
        options: Any = {"first": first, "out_dtype": dtype, "base2": base2, "sinks": sinks}
        out, out_lse = lse_combine.merge(whole, part, return_lse=True, **options)
        assert out.dtype == dtype
        assert_close(out, want, BOUND[dtype])
        assert_same_lse(out_lse, want_lse)
        assert torch.equal(out, lse_combine.merge(whole, part, **options))


@generated
@given(case=cases(), place=st.integers(0, 15))
def test_rescale(impl: Implementation, case: Case, place: int) -> None:
    partials, lses = moved(case.partials, impl.device), moved(case.lse, impl.device)
    N, B, H, D = partials.shape
    rank = place % N
    want, want_lse = summands_in_float64(case.partials, case.lse, case.base2)
    scaled, total = lse_combine.rescale(partials[rank], lses, rank, base2=case.base2)
    assert scaled.shape == (H, B, D)
    assert scaled.is_contiguous()
    assert scaled.dtype == total.dtype == torch.float32
    assert_same_lse(total, want_lse)
    got = scaled.double().cpu().transpose(0, 1)
    assert (got[~case.lse[rank].isfinite()] == 0).all()
    assert (got - want[rank]).norm() <= BOUND[torch.float32] * want.norm()


@pytest.mark.parametrize("marker", EMPTY)
@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_a_shard_without_tokens_leaves_no_trace(
    impl: Implementation, marker: float, poison: float
) -> None:
    partials = torch.randn(4, 2, 3, 64, device=impl.device)
    lse = torch.randn(4, 2, 3, device=impl.device)
    want = lse_combine.combine(partials[1:3], lse[1:3], return_lse=True)
    lse[0], lse[3] = marker, -INF
    partials[0] = partials[3] = poison
    got = lse_combine.combine(partials, lse, return_lse=True)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    summands = [lse_combine.rescale(partials[rank], lse, rank) for rank in range(4)]
    assert all((summands[rank][0] == 0).all() for rank in (0, 3))
    summed = sum(scaled.transpose(0, 1) for scaled, _ in summands), summands[0][1]
    torch.testing.assert_close(summed, want, rtol=1e-6, atol=1e-6)

    lse[:] = marker
    out, out_lse = lse_combine.combine(partials, lse, return_lse=True)
    scaled, total = lse_combine.rescale(partials[0], lse, 0)
    assert (out == 0).all()
    assert (scaled == 0).all()
    assert (out_lse == -INF).all()
    assert (total == -INF).all()


SPLITS = [
    (1, 1, 16, torch.float32),
    (5, 3, 80, torch.bfloat16),
    (16, 2, 512, torch.float16),
    (70, 2, 64, torch.float32),
    (300, 2, 128, torch.bfloat16),
    (600, 1, 96, torch.float16),
]


@pytest.mark.parametrize(("S", "h", "D", "dtype"), SPLITS)
def test_combine_splits(impl: Implementation, S: int, h: int, D: int, dtype: torch.dtype) -> None:
    """Sequences that are cut into one split, into all, and into some; beside ones of no token."""
    if dtype == torch.bfloat16 and not impl.rounds_bf16:
        dtype = torch.float32
    rng, block = torch.Generator().manual_seed(S), 16
    lens = torch.tensor([0, 1, block, S * block, S * block - 5, 7 * block, 3 * S])
    counts = torch.tensor([S, 1, S, S, S, min(3, S), S], dtype=torch.int32)
    B = len(lens)
    even = (lens + counts - 1) // counts
    share = (even + block - 1) // block * block
    written = torch.arange(S) * share[:, None] < lens[:, None]
    x = torch.randn((B, h, S, D), generator=rng)
    lse = 20 * torch.randn((B, h, S), generator=rng)
    lse[3, :, 0] = math.nan  # a split whose tokens are all masked
    x[3, :, 0] = math.nan
    want, want_lse = in_float64(
        x.movedim(2, 0), torch.where(written[:, None], lse, -INF).movedim(2, 0), False
    )
    x.masked_fill_(~written[:, None, :, None], math.nan)
    lse.masked_fill_(~written[:, None], 99.0)
    indptr = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    x = laid_out(x, [2, 0, 1], 4, 1)  # splits first, as strides allow
    parts = (moved(part, impl.device) for part in (x, lse, indptr, counts))
    got, got_lse = lse_combine.combine_splits(Splits(*parts, block, v_scale=0.5), dtype)
    assert (got.dtype, got.shape, got_lse.shape) == (dtype, (B, h, D), (B, h))
    assert_close(got, want / 2, BOUND[dtype])
    assert_same_lse(got_lse, want_lse)
    assert (got[0] == 0).all()


def test_one_shard_is_the_identity(impl: Implementation) -> None:
    partials = torch.randn(1, 3, 2, 128, device=impl.device)
    lse = 20 * torch.randn(1, 3, 2, device=impl.device)
    out, out_lse = lse_combine.combine(partials, lse, return_lse=True)
    assert torch.equal(out, partials[0])
    assert torch.equal(out_lse, lse[0])
    scaled, total = lse_combine.rescale(partials[0], lse, 0)
    assert torch.equal(scaled, partials[0].transpose(0, 1))
    assert torch.equal(total, lse[0])


def test_combine_writes_only_into_the_given_view(impl: Implementation) -> None:
    partials = torch.randn(3, 4, 2, 80, device=impl.device)
    lse = torch.randn(3, 4, 2, device=impl.device)
    want = lse_combine.combine(partials, lse)
    room = torch.full((3, 5, 90), 7.0, device=impl.device)
    out = room[:2, :4, 5:85].transpose(0, 1)  # head-major, rows padded and 4-byte aligned
    assert lse_combine.combine(partials, lse, out=out) is out
    assert torch.equal(out, want)
    out.fill_(7.0)
    assert (room == 7.0).all()


def test_batch_of_nothing(impl: Implementation) -> None:
    partials = torch.empty(4, 0, 2, 64, device=impl.device)
    lse = torch.empty(4, 0, 2, device=impl.device)
    out, out_lse = lse_combine.combine(partials, lse, return_lse=True)
    assert out.shape == (0, 2, 64)
    assert out_lse.shape == (0, 2)
    scaled, total = lse_combine.rescale(partials[0], lse, 3)
    assert scaled.shape == (2, 0, 64)
    assert total.shape == (0, 2)
    send = lse_combine.pack(partials[0], lse[0], 2)
    assert send.shape == (2, 0, 1, 64 * 4 + 16)
    payload, packed = packed_rows.unpack(send, 64, torch.float32)
    assert payload.shape == (2, 0, 1, 64)
    assert packed.shape == (2, 0, 1)


@generated
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
    D=st.sampled_from(SIZES),
    dtype=st.sampled_from(BYTES),
    order=st.permutations(range(2)),
    pitch=st.sampled_from([0, 0, 3, 16]),
    step=st.sampled_from([1, 1, 2]),
    seed=st.integers(0, 2**32),
    given_send=st.booleans(),
)
def test_pack(
    impl: Implementation,
    sizes: tuple[int, int, int],
    D: int,
    dtype: torch.dtype,
    order: list[int],
    pitch: int,
    step: int,
    seed: int,
    given_send: bool,
) -> None:
    N, B, h = sizes
    rng = torch.Generator().manual_seed(seed)
    size = D * dtype.itemsize
    raw = torch.randint(0, 256, (B, N * h, size), generator=rng, dtype=torch.uint8)
    lse = torch.randn((B, N * h), generator=rng)
    lse.view(-1)[:: max(1, seed % 4)] = EMPTY[seed % 3]
    out = moved(laid_out(raw.view(dtype), order, pitch, step), impl.device)
    strided_lse = moved(laid_out(lse[..., None], order, 1, 1)[..., 0], impl.device)

    row = packed_rows.packed_row_bytes(D, dtype)
    assert row % 16 == 0
    assert size + 16 <= row < size + 32
    send = None
    if given_send:
        send = torch.full((N, B, h, row), 0xAB, dtype=torch.uint8, device=impl.device)
    packed = lse_combine.pack(out, strided_lse, N, send)
    assert send is None or packed is send
    assert packed.is_contiguous()
    assert packed.dtype == torch.uint8

    sent = packed.cpu()
    tail = sent[..., row - 16 : row - 12].contiguous().view(torch.float32)[..., 0]
    assert (sent[..., row - 12 :] == 0).all()
    for n in range(N):
        heads = slice(n * h, (n + 1) * h)
        assert torch.equal(sent[n, ..., :size], raw[:, heads])
        clean = torch.where(lse[:, heads].isfinite(), lse[:, heads], -INF)
        assert torch.equal(tail[n], clean)

    payload, view = packed_rows.unpack(packed, D, dtype)
    storage = packed.untyped_storage().data_ptr()
    assert payload.untyped_storage().data_ptr() == view.untyped_storage().data_ptr() == storage
    assert torch.equal(view.cpu(), tail)
    assert torch.equal(payload.contiguous().view(torch.uint8).cpu(), sent[..., :size])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_attention_equals_attention(
    impl: Implementation, ranks: int, dtype: torch.dtype
) -> None:
    """From scores to result, both ways; some ranks hold no token.

    Pack on every rank, exchange, combine; and gather LSEs, rescale on every rank, sum.
    """
    H, D, lengths = 24, 96, [1, 2, 7, 40]
    B = len(lengths)
    torch.manual_seed(ranks)
    scores = 5 * torch.randn(B, H, max(lengths), dtype=torch.float64)
    scores.masked_fill_(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None, None], -INF)
    values = torch.randn(B, max(lengths), D, dtype=torch.float64)
    want = scores.softmax(-1) @ values

    sends, outs, lses = [], [], []
    for rank in range(ranks):
        mine = scores[..., rank::ranks]
        lse = mine.logsumexp(-1)
        partial = mine.softmax(-1) @ values[:, rank::ranks]  # NaN where there is no token
        assert ranks == 1 or rank == 0 or partial.isnan().any()
        outs.append(partial.to(dtype).to(impl.device))
        lses.append(lse.float().to(impl.device))
        sends.append(lse_combine.pack(outs[-1], lses[-1], ranks))
    for rank in range(ranks):
        received = torch.stack([send[rank] for send in sends])
        partials, lse = packed_rows.unpack(received, D, dtype)
        got = lse_combine.combine(partials, lse, out_dtype=torch.float32)
        heads = slice(rank * H // ranks, (rank + 1) * H // ranks)
        assert_close(got, want[:, heads], BOUND[dtype])
    gathered = torch.stack(lses)
    summands = [lse_combine.rescale(out, gathered, rank)[0] for rank, out in enumerate(outs)]
    assert_close(torch.stack(summands).sum(0).transpose(0, 1), want, BOUND[dtype])
