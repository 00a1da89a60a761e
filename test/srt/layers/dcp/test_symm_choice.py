"""What takes the one-kernel exchange and what does not, and for what it is prepared."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang.srt.distributed import parallel_state
from sglang_helix.srt.layers.attention import sharded
from sglang_helix.srt.layers.attention.triton_backend import ShardedTritonAttnBackend
from sglang_helix.srt.layers.dcp import (
    comm,
    exchange,
    gather,
    symm_launch,
    symm_layout,
    symm_workspace,
)
from sglang_helix.srt.layers.dcp.exchange import BACKENDS, Exchanger
from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits
from sglang_helix.srt.layers.dcp.symm_layout import Layout, QueryLayout
from srt.distributed.ranks import run_ranks
from srt.interpreter import INTERPRETED
from srt.layers.dcp.symm_decode import attention_layer


class Recorder:
    """A prepared exchange that notes its calls."""

    max_tokens = 4

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, partial: Partial | Splits | Masked, **options: Any) -> Partial:
        forms = {Partial: "rows", Splits: "splits", Masked: "masked rows"}
        self.calls.append((forms[type(partial)], options))
        return Partial(torch.zeros(1, 4, 16), torch.zeros(1, 4))


@pytest.fixture
def group() -> Any:
    return SimpleNamespace(unique_name="dcp:0", world_size=2, rank_in_group=0)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def exchanger(group: Any, recorder: Recorder, went_to_a2a: list[tuple[Any, ...]]) -> Exchanger:
    exchanger = Exchanger("symm", group)
    exchanger._kernels[8, 16, torch.bfloat16] = recorder  # type: ignore[assignment]
    return exchanger


@pytest.fixture
def went_to_a2a(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def a2a(out: Any, lse: Any, group: Any, *, base2: bool = False, sinks: Any = None) -> Any:
        calls.append((tuple(out.shape), out.dtype, base2 if sinks is None else sinks))
        return Partial(out, lse)

    monkeypatch.setitem(BACKENDS, "symm", replace(BACKENDS["symm"], collective=a2a))
    return calls


def some(B: int, dtype: torch.dtype = torch.bfloat16) -> Partial:
    return Partial(torch.zeros(B, 8, 16, dtype=dtype), torch.zeros(B, 8))


def some_splits(B: int, S: int = 3) -> Splits:
    return Splits(
        torch.zeros(B, 8, S, 16),
        torch.zeros(B, 8, S),
        torch.zeros(B + 1, dtype=torch.int32),
        torch.ones(B, dtype=torch.int32),
        32,
    )


def test_size_and_dtype_decide(
    exchanger: Exchanger, recorder: Recorder, went_to_a2a: list[tuple[Any, ...]]
) -> None:
    for B in (0, 1, 4):
        exchanger(some(B))
    assert len(recorder.calls) == 3
    assert not went_to_a2a
    exchanger(some(5), base2=True)
    exchanger(some(1, torch.float32))
    assert went_to_a2a == [
        ((5, 8, 16), torch.bfloat16, True),
        ((1, 8, 16), torch.float32, False),
    ]
    assert len(recorder.calls) == 3


def test_what_goes_to_a2a_is_said_once(
    exchanger: Exchanger,
    recorder: Recorder,
    went_to_a2a: list[tuple[Any, ...]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    exchange._say_once.cache_clear()
    with caplog.at_level("INFO"):
        exchanger(some(4))
        assert not caplog.messages
        for B in (5, 6, 7):
            exchanger(some(B))
            exchanger(some(B, torch.float32))
    assert caplog.messages == [
        "symm: batches of more than 4 tokens go to a2a",
        "symm: 8 heads of 16 elements in torch.float32 go to a2a",
    ]


def test_splits_are_reduced_by_the_exchange_or_merged_before_it(
    exchanger: Exchanger, recorder: Recorder, went_to_a2a: list[tuple[Any, ...]]
) -> None:
    exchanger(some_splits(4), torch.bfloat16)
    assert [name for name, _ in recorder.calls] == ["splits"]
    exchanger(some_splits(5), torch.bfloat16)
    assert went_to_a2a == [((5, 8, 16), torch.bfloat16, False)]
    assert len(recorder.calls) == 1
    # More than one program would want to read in turn.
    exchanger(some_splits(4, 8), torch.bfloat16)
    exchanger(some_splits(4, 9), torch.bfloat16, head_major=True)
    assert [name for name, _ in recorder.calls[1:]] == ["splits", "rows"]
    assert recorder.calls[-1][1]["head_major"]


def test_masked_rows_are_marked_by_the_exchange_or_before_it(
    exchanger: Exchanger, recorder: Recorder
) -> None:
    def some_masked(B: int) -> Masked:
        return Masked(*some(B), torch.arange(B) == 1)

    exchanger(some_masked(4), torch.bfloat16)
    exchanger(Masked(*some(4, torch.float32), torch.arange(4) == 1), torch.bfloat16)
    assert [name for name, _ in recorder.calls] == ["masked rows"] * 2
    for others in (exchanger, Exchanger("a2a", exchanger.group), Exchanger("ag_rs", "group")):
        came: list[torch.Tensor] = []

        def collective(out: Any, lse: Any, group: Any, came: Any = came, **options: Any) -> Any:
            came.append(lse)
            return Partial(out, lse)

        others.backend = replace(others.backend, collective=collective)
        others(some_masked(5), torch.bfloat16)
        [lse] = came
        assert lse.isneginf().all(1).tolist() == [False, True, False, False, False]
    assert len(recorder.calls) == 2
    with pytest.raises(ValueError, match="too many values to unpack"):
        _out, _lse = some_masked(1)  # type: ignore[misc]
    assert not hasattr(some_masked(1), "lse"), "whoever wants a `Partial`"


def test_sinks_go_with_what_is_exchanged(
    exchanger: Exchanger, recorder: Recorder, went_to_a2a: list[tuple[Any, ...]]
) -> None:
    sinks = torch.zeros(4)
    exchanger(some(4), sinks=sinks)
    exchanger(some_splits(4), torch.bfloat16, sinks=sinks)
    exchanger(some_splits(4, 9), torch.bfloat16, sinks=sinks)
    assert [name for name, _ in recorder.calls] == ["rows", "splits", "rows"]
    assert all(options["sinks"] is sinks for _, options in recorder.calls)
    exchanger(some_splits(5), torch.bfloat16, sinks=sinks)
    assert [sunk is sinks for _, _, sunk in went_to_a2a] == [True]


def test_a_group_that_was_not_prepared_is_an_error(group: Any) -> None:
    with pytest.raises(RuntimeError, match="no symm exchange was prepared for the group dcp:0"):
        Exchanger("symm", group)(some(1))


@pytest.mark.parametrize("mla", [False, True])
def test_the_layer_under_way_is_passed_on(
    exchanger: Exchanger, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, mla: bool
) -> None:
    """Of attention, which knows it, to the exchange: MLA's is called by a model that does not."""
    adapter = object.__new__(ShardedTritonAttnBackend)
    adapter.exchanger, adapter.mla, adapter.heads, adapter.base2 = exchanger, mla, 8, False
    monkeypatch.setattr(adapter, "partial_decode", lambda *args: some_splits(1))
    q, batch = torch.zeros(1, 8, 16, dtype=torch.bfloat16), SimpleNamespace()
    parts = {"q_rope": q[..., :4], "k_rope": None} if mla else {}
    for layer_id in (17, 3):
        layer = attention_layer(8, 16, 4 if mla else 0, 1.0)
        layer.layer_id = layer_id
        given = adapter.forward_decode(q, None, None, layer, batch, save_kv_cache=False, **parts)
        if mla:
            exchanger.group.exchanger = exchanger
            comm.cp_lse_ag_out_rs_mla(*given, exchanger.group)
    assert [options["layer"] for _, options in recorder.calls] == [17, 3]


@pytest.mark.parametrize(("backend", "autotune"), [("a2a", False), ("symm", True)])
def test_splits_are_merged_where_the_model_reads_the_output(
    monkeypatch: pytest.MonkeyPatch, backend: str, autotune: bool
) -> None:
    adapter = object.__new__(ShardedTritonAttnBackend)
    adapter.exchanger = Exchanger(backend, SimpleNamespace())
    monkeypatch.setattr(adapter, "partial_decode", lambda *args: some_splits(2))
    monkeypatch.setattr(sharded, "get_in_autotune_dummy_run", lambda: autotune)
    monkeypatch.setattr(sharded, "combine_splits", lambda splits, dtype: ("out", "lse", dtype))
    q = torch.zeros(2, 8, 16, dtype=torch.bfloat16)
    parts = {"q_rope": q[..., :4], "k_rope": None}
    layer, batch = attention_layer(8, 16, 4, 1.0), SimpleNamespace()
    got = adapter.forward_decode(q, None, None, layer, batch, save_kv_cache=False, **parts)
    assert got == ("out", "lse", torch.bfloat16)


def test_prepared_once_for_each_shape(monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    made: list[tuple[Any, ...]] = []

    class Kernel:
        def __init__(self, *args: Any, timeout: float) -> None:
            made.append(args)
            self.max_tokens = args[1]
            self.layout = Layout(2, args[2], args[3], args[4], self.max_tokens)

    monkeypatch.setattr(symm_workspace, "SymmExchange", Kernel)
    group.cpu_group, group.device = "cpu group", torch.device("cuda:0")

    exchanger = Exchanger("symm", group)

    def prepare(tokens: int | None, heads: int) -> Any:
        exchanger.prepare(
            max_tokens=tokens,
            num_heads=heads,
            head_dim=512,
            dtype=torch.bfloat16,
            timeout=7.0,
        )
        return exchanger._kernels[heads, 512, torch.bfloat16]

    def most(heads: int) -> int:
        return symm_layout.largest_batch(Layout(2, heads, 512, torch.bfloat16, 0))

    small, large = prepare(8, 128), prepare(100_000, 64)
    assert prepare(64, 128) is small
    assert [args[:4] for args in made] == [
        ("cpu group", 8, 128, 512),
        ("cpu group", most(64), 64, 512),
    ]
    assert large.layout.max_tokens * large.layout.token_bytes <= symm_layout._MAX_BYTES
    assert prepare(None, 32).max_tokens == most(32)


class GatherRecorder:
    """A prepared gather that notes its calls."""

    max_tokens = 4

    def __init__(self) -> None:
        self.layers: list[int] = []

    def __call__(self, parts: tuple[torch.Tensor, ...], layer: int) -> torch.Tensor:
        self.layers.append(layer)
        return torch.cat(parts, -1).repeat(1, 2, 1)


def test_size_shape_and_dtype_decide_who_gathers_queries(
    group: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Never how they lie, which may not be the same on every rank."""
    exchange._say_once.cache_clear()
    collected: list[tuple[int, ...]] = []

    def all_gather(x: torch.Tensor, dim: int) -> torch.Tensor:
        collected.append(tuple(x.shape))
        return torch.cat([x, x], dim)

    group.all_gather, group.exchanger = all_gather, Exchanger("symm", group)

    def queries(T: int, heads: int = 4, dtype: torch.dtype = torch.bfloat16) -> Any:
        return tuple(torch.randn(T, heads, width).to(dtype) for width in (16, 8))

    assert gather.all_gather(queries(1), group).shape == (1, 8, 24)
    assert collected == [(4, 1, 24)]  # nothing was prepared
    recorder = GatherRecorder()
    group.exchanger._gathers[8, (16, 8), torch.bfloat16] = recorder
    with caplog.at_level("INFO"):
        for T in (0, 1, 4):
            assert gather.all_gather(queries(T), group, layer=T).shape == (T, 8, 24)
        latent, rope = queries(4)
        odd = latent.transpose(0, 1).contiguous().transpose(0, 1), rope[..., torch.arange(8)]
        gather.all_gather(odd, group)
        assert recorder.layers == [0, 1, 4, -1]
        assert not caplog.messages
        for _ in range(2):
            gather.all_gather(queries(5), group)
            gather.all_gather(queries(1, dtype=torch.float32), group)
            gather.all_gather(queries(1, heads=2), group)
            gather.all_gather(queries(1)[:1], group)
    assert len(recorder.layers) == 4
    assert len(collected) == 9
    assert caplog.messages == [
        "symm: queries of more than 4 tokens are all-gathered",
        "symm: queries of 8 heads of (16, 8) elements in torch.float32 are all-gathered",
        "symm: queries of 4 heads of (16, 8) elements in torch.bfloat16 are all-gathered",
        "symm: queries of 8 heads of (16,) elements in torch.bfloat16 are all-gathered",
    ]


def test_a_gather_is_prepared_once_for_each_shape_that_it_serves(
    monkeypatch: pytest.MonkeyPatch, group: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[tuple[Any, ...]] = []

    class Kernel:
        def __init__(self, *args: Any, timeout: float) -> None:
            made.append(args)
            self.max_tokens = args[1]
            self.layout = QueryLayout(2, *args[2:5], self.max_tokens)

    monkeypatch.setattr(symm_workspace, "SymmGather", Kernel)
    group.cpu_group, group.device = "cpu group", torch.device("cuda:0")

    def prepare(exchanger: Exchanger, tokens: int | None, widths: tuple[int, ...]) -> Any:
        exchanger.prepare_queries(
            max_tokens=tokens, num_heads=128, widths=widths, dtype=torch.bfloat16, timeout=7.0
        )
        return exchanger._gathers.get((128, widths, torch.bfloat16))

    symm = Exchanger("symm", group)
    small = prepare(symm, 8, (512, 64))
    assert prepare(symm, 64, (512, 64)) is small
    assert prepare(symm, None, (128,)).max_tokens == symm_layout._MAX_BYTES // (128 * 128 * 2)
    with caplog.at_level("INFO"):
        assert prepare(symm, 8, (512, 4)) is None
    assert caplog.messages == [
        "symm: queries of (512, 4) elements (torch.bfloat16) are all-gathered"
    ]
    assert prepare(Exchanger("a2a", group), 8, (512, 64)) is None
    assert [args[1:4] for args in made] == [(8, 128, (512, 64)), (4096, 128, (128,))]


def refused_on_rank(rank: int, world_size: int) -> str:
    with pytest.raises(RuntimeError) as refused:
        Exchanger("symm", parallel_state.get_world_group()).prepare(
            max_tokens=8,
            num_heads=8,
            head_dim=64,
            dtype=torch.bfloat16,
            timeout=7.0,
        )
    return str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
@pytest.mark.skipif(INTERPRETED, reason="starts ranks")
def test_sglangs_groups_without_gpus_are_refused_on_every_rank() -> None:
    for message in run_ranks(refused_on_rank, 2):
        assert "symm needs CUDA devices" in message
        assert message.endswith("use --dcp-comm-backend a2a instead of symm")


def test_an_eager_call_works_nothing_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once a layer, where no graph hides what the host does."""
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        symm_launch,
        "exchange_kernel",
        {(5, 1): lambda *args, **options: launched.append((len(args), options["BASE2"]))},
    )
    layout = Layout(2, 8, 16, torch.bfloat16, 4)
    workspace = symm_workspace.one_device(layout, torch.device("cpu"), 5)
    workspace = replace(workspace, local_ranks=1, epochs=workspace.epochs[0])
    ours = str(Path(symm_launch.__file__).parent)
    called: list[str] = []

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ours):
            called.append(frame.f_code.co_name)

    def call(tokens: int, base2: bool) -> list[str]:
        """The series' functions that it runs."""
        called.clear()
        partial = some(tokens)
        sys.setprofile(note)
        try:
            symm_launch.exchange(workspace, partial, base2=base2, layer=len(launched))
        finally:
            sys.setprofile(None)
        return [name for name in called if name != "<genexpr>"]

    for form in ((2, False), (4, False), (2, True)):
        assert "_prepare" in call(*form)
        for _ in range(3):
            assert sorted(call(*form)) == ["_form"] * 3 + ["exchange"]
    assert [base2 for _, base2 in launched] == [False] * 8 + [True] * 4
