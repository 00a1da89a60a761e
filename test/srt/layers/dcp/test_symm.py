"""The one-kernel exchange against float64: one suite for Triton's interpreter and for CUDA.

In the interpreter ranks send and receive in random order, one at a time; on CUDA one cooperative
launch plays them all at once. The interpreter truncates where hardware rounds fp32 to bf16, so
there results are asked for in fp32, which reads bf16 and fp16 payloads exactly.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from sglang_helix.srt.layers.dcp import symm_launch
from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits
from sglang_helix.srt.layers.dcp.symm_layout import Layout
from srt.fresh import Fresh, in_forks
from srt.interpreter import DEVICE, INTERPRETED, launches, passes, without_a_gpu
from srt.layers.dcp.symm_ranks import EMPTY, INF, Ranks, expected, poison, relative_error

BOUND = {torch.float32: 2e-6}
if DEVICE == "cuda":
    BOUND |= {torch.float16: 5e-4, torch.bfloat16: 4e-3}
generated = settings(  # on CUDA most examples compile kernels of their own
    max_examples=20 if DEVICE == "cpu" else 8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@without_a_gpu
def test_interpreter(interpreted: Fresh) -> None:
    passes(interpreted, __file__)


def partial(N: int, B: int, layout: Layout, spread: float = 3.0):
    """Stacked partial outputs and LSEs, some of them empty, in memory that is not contiguous."""
    H, D = layout.heads, layout.head_dim
    wide = torch.randn(N * B, H + 1, D + 16, device=DEVICE).to(layout.wire)
    x, lse = wide[:, :H, :D], torch.randn(H, N * B, device=DEVICE).mul_(spread).t()
    x.masked_fill_(torch.rand(x.shape, device=DEVICE) < 0.2, -0.0)
    poison(x, lse)
    return x, lse


@st.composite
def layouts(draw) -> Layout:
    ranks = draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    heads = draw(st.integers(1, 2 * ranks + 1))
    wire = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    head_dim = draw(st.sampled_from([8, 24, 80, 96, 128, 192]))
    return Layout(ranks, heads, head_dim, wire, 5, draw(st.booleans()))


@launches
@generated
@given(data=st.data())
def test_calls_of_all_sizes_give_the_exact_combination(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    ranks = Ranks(layout, DEVICE, warps=data.draw(st.integers(1, 4)))
    for call in range(data.draw(st.integers(1, 4))):
        B = data.draw(st.integers(0, 5), label=f"batch of call {call}")
        dtype = data.draw(st.sampled_from(list(BOUND)))
        x, lse = partial(layout.ranks, B, layout)
        want, want_lse = expected(x, lse, layout.ranks)
        results = ranks(x, lse, out_dtype=dtype)
        for rank, got in enumerate(results):
            own = layout.owned_by(rank)
            heads = slice(own.start, own.stop)
            assert got.out.dtype == dtype
            assert relative_error(got.out, want[:, heads]) < BOUND[dtype]
            torch.testing.assert_close(got.lse.double(), want_lse[:, heads], rtol=2e-6, atol=2e-6)


@launches
def test_ranks_out_of_step() -> None:
    """A rank may be a call ahead of another, whose slot it must not touch."""
    layout = Layout(3, 6, 16, torch.float32, 2)
    world = Ranks(layout, DEVICE, warps=3)
    calls = [partial(3, B, layout) for B in (2, 1, 2, 2, 1, 2, 2)]

    def launch(call: int, rank: int, phase: int) -> Partial:
        own = Partial(*(part.chunk(3)[rank] for part in calls[call]))
        return symm_launch.exchange(world.apart[rank], own, phase=phase)

    for results, (x, lse) in zip(world.out_of_step(len(calls), launch), calls, strict=True):
        got = torch.cat([result.out for result in results], 1)
        assert relative_error(got, expected(x, lse, 3)[0]) < BOUND[torch.float32]


@pytest.mark.skipif(not INTERPRETED, reason="on GPUs test_symm_gpu does so")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("ahead", [False, True])
def test_ranks_in_processes_of_their_own(ahead: bool, ranks: int) -> None:
    """They send and wait in one launch, as on devices that start one program after the other."""
    layout = Layout(ranks, 2 * ranks, 16, torch.float32, 3, ahead)
    world = Ranks(layout, DEVICE, warps=2)  # programs of one, two and three rows
    world.share()
    calls = [partial(ranks, B, layout) for B in (3, 1, 3, 2)]
    outcomes = in_forks([(_all_calls, world, rank, calls) for rank in range(ranks)], {}, 240)
    assert [status for status, *_ in outcomes] == [0] * ranks, outcomes
    for call, (x, lse) in enumerate(calls):
        got = torch.cat([results[call] for _, results, _ in outcomes], 1)
        assert relative_error(got, expected(x, lse, ranks)[0]) < BOUND[torch.float32]


def _all_calls(world: Ranks, rank: int, calls: list[Any]) -> list[torch.Tensor]:
    results = []
    for parts in calls:
        time.sleep(world.random.random() * (rank + 1) / 100)
        own = Partial(*(part.chunk(world.layout.ranks)[rank] for part in parts))
        results.append(symm_launch.exchange(world.apart[rank], own).out)
    return results


def small(ranks: int = 3, heads: int = 6, head_dim: int = 128, **options) -> Layout:
    wire = options.pop("wire", torch.bfloat16)
    return Layout(ranks, heads, head_dim, wire, max_tokens=4, **options)


def own_heads(layout: Layout, rank: int) -> slice:
    own = layout.owned_by(rank)
    return slice(own.start, own.stop)


@launches
@pytest.mark.parametrize("heads", [9, 17])
def test_ranks_that_own_fewer_heads_or_none(heads: int) -> None:
    layout = small(ranks=8, heads=heads)
    assert [len(layout.owned_by(rank)) for rank in (0, 7)] == [-(-heads // 8), 0]
    ranks = Ranks(layout, DEVICE)
    for B in (2, 1, 3):
        x, lse = partial(8, B, layout)
        want, _ = expected(x, lse, 8)
        for rank, got in enumerate(ranks(x, lse, out_dtype=torch.float32)):
            torch.testing.assert_close(
                got.out.double(), want[:, own_heads(layout, rank)], rtol=1e-5, atol=1e-5
            )


@launches
def test_no_tokens_anywhere_gives_zero_and_minus_infinity() -> None:
    layout = small()
    x = torch.full((6, 6, 128), float("nan"), dtype=layout.wire, device=DEVICE)
    lse = torch.tensor([-INF, INF, float("nan")], device=DEVICE).repeat(6, 2)
    for got in Ranks(layout, DEVICE)(x, lse):
        assert torch.equal(got.out, torch.zeros_like(got.out))
        assert torch.equal(got.lse, torch.full_like(got.lse, -INF))


@launches
def test_values_that_are_not_finite_travel_where_there_are_tokens() -> None:
    layout = small(ranks=2, heads=2)
    x, lse = torch.zeros(2, 2, 128, dtype=layout.wire, device=DEVICE), torch.zeros(2, 2)
    x[0, 0, 0], x[1, 0, 1], x[0, 1, 2] = INF, float("nan"), -INF
    results = Ranks(layout, DEVICE)(x, lse.to(DEVICE))
    got = torch.cat([result.out for result in results], 1).float().cpu()
    assert got[0, 0, 0] == INF
    assert got[0, 0, 1].isnan()
    assert got[0, 1, 2] == -INF
    assert int((got != 0).sum()) == 3


@launches
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_never_sent_may_still_be_an_input(wire: torch.dtype) -> None:
    """The very bits that stand for "nothing has arrived", in a payload and in an LSE."""
    layout = small(ranks=4, heads=4, wire=wire)
    ranks = Ranks(layout, DEVICE)
    for _ in range(3):
        x = torch.randn(8, 4, 128, device=DEVICE).to(wire)
        lse = torch.randn(8, 4, device=DEVICE)
        # All ones: a NaN in token 0 of rank 1; and as an LSE, no token of rank 2 anywhere.
        x.view(torch.uint8)[2, :, 16:32] = 0xFF
        lse.view(torch.uint8).view(8, 4, 4)[4:6] = 0xFF
        want, want_lse = expected(x, lse, 4)
        for rank, got in enumerate(ranks(x, lse, out_dtype=torch.float32)):
            own = own_heads(layout, rank)
            torch.testing.assert_close(
                got.out.double(), want[:, own], rtol=1e-5, atol=1e-5, equal_nan=True
            )
            torch.testing.assert_close(got.lse.double(), want_lse[:, own], rtol=1e-5, atol=1e-5)
        assert want.isnan().any()


@launches
def test_rows_that_are_not_aligned_are_copied() -> None:
    layout = small()
    odd = torch.randn(6, 6, 129, device=DEVICE).to(layout.wire)[..., 1:]
    lse = torch.randn(6, 6, device=DEVICE)
    want, _ = expected(odd, lse, 3)
    for rank, got in enumerate(Ranks(layout, DEVICE)(odd, lse, out_dtype=torch.float32)):
        torch.testing.assert_close(
            got.out.double(), want[:, own_heads(layout, rank)], rtol=1e-5, atol=1e-5
        )


@launches
def test_base_2_lse() -> None:
    layout = small(heads=7)
    x, lse = partial(3, 4, layout)
    sinks = torch.randn(7, device=DEVICE)
    want, want_lse = expected(x, lse, 3, sinks)
    ln_2 = torch.tensor(2.0, dtype=torch.float64).log()
    options = {"base2": True, "sinks": sinks, "out_dtype": torch.float32}
    for rank, got in enumerate(Ranks(layout, DEVICE)(x, lse / float(ln_2), **options)):
        own = own_heads(layout, rank)
        torch.testing.assert_close(got.out.double(), want[:, own], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.lse.double() * ln_2, want_lse[:, own], rtol=1e-5, atol=1e-5)


@launches
@pytest.mark.parametrize("sink", [-INF, -3.0, 90.0])
def test_sinks_count_once(sink: float) -> None:
    layout = small(heads=5)
    x, lse = partial(3, 2, layout)
    sinks = torch.randn(5, device=DEVICE) + sink
    want, want_lse = expected(x, lse, 3, sinks)
    options = {"sinks": sinks, "out_dtype": torch.float32}
    for rank, got in enumerate(Ranks(layout, DEVICE)(x, lse, **options)):
        own = own_heads(layout, rank)
        torch.testing.assert_close(got.out.double(), want[:, own], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.lse.double(), want_lse[:, own], rtol=1e-5, atol=1e-5)


@launches
def test_heads_first() -> None:
    layout = small()
    x, lse = partial(3, 4, layout)
    plain = Ranks(layout, DEVICE)(x, lse)
    for one, other in zip(plain, Ranks(layout, DEVICE)(x, lse, head_major=True), strict=True):
        assert torch.equal(one.out, other.out)
        assert other.out.stride(0) < other.out.stride(1)


@launches
def test_an_empty_batch_launches_nothing_and_epochs_stand_still() -> None:
    layout = small()
    ranks = Ranks(layout, DEVICE)
    before = ranks.together.epochs.clone()
    x = torch.empty(0, 6, 128, dtype=layout.wire, device=DEVICE)
    got = ranks(x, x.new_empty(0, 6, dtype=torch.float32))[0]
    assert (got.out.shape, got.lse.shape) == ((0, 2, 128), (0, 2))
    assert torch.equal(ranks.together.epochs, before)


@launches
@pytest.mark.parametrize(
    ("ranks", "heads", "head_dim", "ahead"),
    [(2, 4, 128, False), (3, 7, 80, True)],
)
def test_rows_without_keys_that_their_lse_does_not_show(
    ranks: int, heads: int, head_dim: int, ahead: bool
) -> None:
    """Whatever stands in them: the same, bit for bit, as with an LSE that shows it."""
    layout = small(ranks, heads, head_dim, ahead=ahead)
    world, ln_2 = Ranks(layout, DEVICE, warps=2), float(torch.tensor(2.0).double().log())
    for B, garbage in ((2, float("nan")), (3, 7.0)):
        x, lse = partial(ranks, B, layout)
        empty = torch.rand(ranks * B, device=DEVICE) < 0.4
        empty[::B] = True  # nobody has a key for the first
        shown = lse.masked_fill(empty[:, None], -INF)
        held = torch.tensor([0.0, 1e30, -1e30, *EMPTY], device=DEVICE)
        held = held[torch.arange(lse.numel(), device=DEVICE) % len(held)].view_as(lse)
        lse = held.where(empty[:, None], lse)
        x = x.masked_fill(empty[:, None, None], garbage)
        sinks = torch.randn(heads, device=DEVICE)
        options = {"base2": True, "sinks": sinks, "out_dtype": torch.float32}
        masked = world.masked(x, lse, empty, **options)
        marked = world(x, shown, **options)
        want, want_lse = expected(x, shown * ln_2, ranks, sinks)
        for rank, (got, same) in enumerate(zip(masked, marked, strict=True)):
            assert torch.equal(got.out, same.out)
            assert torch.equal(got.lse, same.lse)
            own, total = own_heads(layout, rank), got.lse.double() * ln_2
            torch.testing.assert_close(got.out.double(), want[:, own], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(total, want_lse[:, own], rtol=1e-5, atol=1e-5)
            assert not got.out[0].any()


def splits_of(layout: Layout, B: int, S: int, block: int) -> tuple[list[Splits], tuple]:
    """Per rank: what split-KV decoding leaves; stacked: the partials that it stands for."""
    H, D = layout.heads, layout.head_dim
    outs, lses, ranks = [], [], []
    for _ in range(layout.ranks):
        lengths = torch.randint(0, 6 * block, (B,))
        lengths[torch.rand(B) < 0.2] = 0
        counts = torch.randint(1, S + 1, (B,))
        out, lse = torch.randn(B, H, S, D), torch.randn(B, H, S)
        share = ((lengths + counts - 1) // counts + block - 1) // block * block
        dead = torch.arange(S) * share[:, None] >= lengths[:, None]
        out.masked_fill_(dead[:, None, :, None], float("nan"))
        lse.masked_fill_(dead[:, None], INF)
        merged, total = expected(
            out.movedim(2, 0).flatten(0, 1), lse.movedim(2, 0).flatten(0, 1), S
        )
        outs.append(merged)
        lses.append(total)
        lse.masked_fill_(dead[:, None], 50.0)  # never written: memory holds anything
        indptr = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        ranks.append(
            Splits(
                *(t.to(DEVICE) for t in (out, lse, indptr, counts.int())), block=block, v_scale=0.5
            )
        )
    return ranks, (torch.cat(outs) * 0.5, torch.cat(lses))


@launches
@pytest.mark.parametrize("wire", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "heads", "head_dim"), [(2, 4, 64), (3, 5, 80), (4, 4, 192)])
def test_split_kv_partials(wire: torch.dtype, ranks: int, heads: int, head_dim: int) -> None:
    layout = small(ranks, heads, head_dim, wire=wire)
    world = Ranks(layout, DEVICE)
    for B in (3, 1):
        splits, (x, lse) = splits_of(layout, B, S=5, block=16)
        want, want_lse = expected(x, lse, ranks)
        if DEVICE == "cuda":
            lengths = torch.cat([s.indptr.diff() for s in splits])
            together = Splits(
                *(torch.cat([s[i] for s in splits]) for i in (0, 1)),
                torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
                torch.cat([s.counts for s in splits]),
                *splits[0][4:],
            )
            results = world.launched(together, out_dtype=torch.float32)
        else:
            results = world.separately(splits, out_dtype=torch.float32)
        bound = {torch.float32: 3e-6, torch.float16: 4e-4, torch.bfloat16: 8e-3}[wire]
        for rank, got in enumerate(results):
            own = own_heads(layout, rank)
            assert relative_error(got.out.cpu(), want[:, own]) < bound
            torch.testing.assert_close(
                got.lse.double().cpu(), want_lse[:, own], rtol=3e-6, atol=3e-6
            )


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 192, 512, 576, 640, 1024])
def test_heads_are_cut_into_few_equal_rows(head_dim: int, wire: torch.dtype) -> None:
    layout = small(head_dim=head_dim, wire=wire)
    row = head_dim // layout.parts
    assert row * layout.parts == head_dim
    assert row <= 512
    assert row * wire.itemsize % 16 == 0
    assert head_dim % 128 or row % 128 == 0  # a group of 128 is never cut
    assert layout.parts == {576: 2, 640: 5, 1024: 2}.get(head_dim, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (6, 5, 128)}, "H = 6, D = 128"),
        ({"x": (6, 6, 64)}, "H = 6, D = 128"),
        ({"lse": (6, 5)}, r"lse must be \[6, 6\]"),
        ({"x": (15, 6, 128), "lse": (15, 6)}, "at most 4 tokens.*got 5.*a2a"),
        ({"sinks": torch.empty(5)}, r"sinks must be contiguous \[6\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    layout = small()
    x = torch.empty(change.pop("x", (6, 6, 128)), dtype=layout.wire)
    lse = torch.empty(change.pop("lse", (6, 6)))
    workspace = Ranks(layout, "cpu", warps=1).together
    with pytest.raises(ValueError, match=message):
        symm_launch.exchange(workspace, Partial(x, lse), **change)


@pytest.mark.parametrize(
    "empty",
    [
        torch.zeros(5, dtype=torch.bool),
        torch.zeros(6, 1, dtype=torch.bool),
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(12, dtype=torch.bool)[::2],
    ],
)
def test_a_mask_that_does_not_fit_is_refused(empty: torch.Tensor) -> None:
    workspace = Ranks(small(), "cpu", warps=1).together
    x, lse = torch.empty(6, 6, 128, dtype=torch.bfloat16), torch.empty(6, 6)
    with pytest.raises(ValueError, match=r"rows are empty must be contiguous bool \[6\]"):
        symm_launch.exchange(workspace, Masked(x, lse, empty))


def test_dtypes_that_do_not_fit_are_refused() -> None:
    workspace = Ranks(small(), "cpu", warps=1).together
    x, lse = torch.empty(6, 6, 128, dtype=torch.bfloat16), torch.empty(6, 6)
    with pytest.raises(TypeError, match="bfloat16 with an fp32 lse"):
        symm_launch.exchange(workspace, Partial(x.half(), lse))
    with pytest.raises(TypeError, match="bfloat16 with an fp32 lse"):
        symm_launch.exchange(workspace, Partial(x, lse.double()))
    with pytest.raises(TypeError, match=r"fp32, got torch\.float8_e4m3fn"):
        symm_launch.exchange(workspace, Partial(x, lse), out_dtype=torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        small(wire=torch.float64)
    with pytest.raises(ValueError, match=r"whole 16-byte vectors.*a2a"):
        small(head_dim=4)


def test_what_every_call_reads_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager decode calls once a layer; working it out again took longer than all the rest."""
    workspace = Ranks(Layout(8, 128, 512, torch.bfloat16, 64), "cpu").apart[0]
    calls: list[dict[str, object]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            return lambda *arguments, **constants: calls.append(constants)

    monkeypatch.setattr(symm_launch, "exchange_kernel", Kernel())
    partial = Partial(torch.zeros(2, 128, 512, dtype=torch.bfloat16), torch.zeros(2, 128))
    first = symm_launch.exchange(workspace, partial, head_major=True)
    with monkeypatch.context() as patch:
        for name in ("_prepare", "_check_partial", "_vectors"):
            patch.delattr(symm_launch, name)
        second = symm_launch.exchange(workspace, partial, head_major=True)
    assert calls[0] == calls[1]
    assert first.out.stride() == second.out.stride() == (512, 2 * 512, 1)
    # Of another form all is looked at again.
    with pytest.raises(TypeError, match="fp32 lse"):
        symm_launch.exchange(workspace, Partial(partial.out, partial.lse.half()), head_major=True)


@pytest.mark.parametrize(("splits", "programs"), [(False, 64), (True, 16)])
def test_a_launch_fills_what_is_resident(
    monkeypatch: pytest.MonkeyPatch, splits: bool, programs: int
) -> None:
    """The limit is in warps: kernels of few warps get more programs of the same device."""
    layout = Layout(8, 128, 512, torch.bfloat16, 64)
    assert (layout.warps(False), layout.warps(True)) == (1, 4)
    workspace = replace(Ranks(layout, "cpu").apart[0], warps=64)
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(symm_launch, "exchange_kernel", Kernel())
    for B in (1, 64):
        x, lse = torch.zeros(B, 128, 512), torch.zeros(B, 128)
        if splits:
            lengths = torch.zeros(B + 1, dtype=torch.int32)
            partial = Splits(x[:, :, None], lse[..., None], lengths, lengths[1:], 32)
        else:
            partial = Partial(x.bfloat16(), lse)
        symm_launch.exchange(workspace, partial)
    assert grids == [(16, 1), (programs, 1)]
