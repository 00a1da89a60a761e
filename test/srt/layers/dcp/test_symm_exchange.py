"""The way from attention to the one-kernel exchange: what takes it, what does not, and the result.

Where there is no GPU the kernels run in Triton's interpreter, in a process of its own. All ranks
send before any receives, so a step is played twice on every rank, once for each phase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang.srt.distributed import parallel_state
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_helix.srt.layers.attention import sharded
from sglang_helix.srt.layers.attention.kv_splits import BLOCK, Scratch, SplitPlan, Tile
from sglang_helix.srt.layers.attention.triton_backend import ShardedTritonAttnBackend
from sglang_helix.srt.layers.dcp import comm, exchange, symm_launch, symm_layout, symm_workspace
from sglang_helix.srt.layers.dcp.exchange import BACKENDS, Exchanger
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.layers.dcp.partial import Partial, Splits
from sglang_helix.srt.layers.dcp.symm import RECEIVE, SEND
from sglang_helix.srt.layers.dcp.symm_layout import Layout
from sglang_helix.srt.models.value_projection import own_values
from srt.distributed.ranks import run_ranks
from srt.fresh import Fresh
from srt.interpreter import DEVICE, INTERPRETED, kernels, passes, without_a_gpu
from srt.layers.dcp.symm_ranks import Ranks as Workspaces
from srt.layers.dcp.symm_ranks import expected, poison, relative_error

from benchmark.dcp import measure


@without_a_gpu
def test_interpreter(interpreted: Fresh) -> None:
    passes(interpreted, __file__, "-m", "gpu")


class Recorder:
    """A prepared exchange that notes its calls."""

    max_tokens = 4

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, partial: Partial | Splits, **options: Any) -> Partial:
        self.calls.append(("splits" if isinstance(partial, Splits) else "rows", options))
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

    small, large = prepare(8, 128), prepare(100_000, 64)
    assert prepare(64, 128) is small
    assert [args[:4] for args in made] == [
        ("cpu group", 8, 128, 512),
        ("cpu group", symm_layout.largest_batch(2, 64, 512, torch.bfloat16), 64, 512),
    ]
    assert large.layout.max_tokens * large.layout.token_bytes <= symm_layout._MAX_BYTES
    assert prepare(None, 32).max_tokens == symm_layout.largest_batch(2, 32, 512, torch.bfloat16)


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


class Phase:
    """A rank's prepared exchange in the interpreter: sends, or receives."""

    def __init__(self, workspace: Any) -> None:
        self.workspace, self.phase = workspace, SEND
        self.forms: set[str] = set()
        self.max_tokens = workspace.layout.max_tokens

    def __call__(self, partial: Partial | Splits, layer: int, **options: Any) -> Partial:
        self.forms.add("splits" if isinstance(partial, Splits) else "rows")
        return symm_launch.exchange(self.workspace, partial, phase=self.phase, **options)


class Ranks:
    """All ranks of a group, one after the other in each phase."""

    def __init__(
        self, size: int, heads: int, width: int, dtype: torch.dtype, tokens: int = 6
    ) -> None:
        self.kernels = [
            Phase(workspace)
            for workspace in Workspaces(Layout(size, heads, width, dtype, tokens), DEVICE).apart
        ]
        self.groups = [
            SimpleNamespace(unique_name=f"dcp:{rank}", world_size=size, rank_in_group=rank)
            for rank in range(size)
        ]
        for group, kernel in zip(self.groups, self.kernels, strict=True):
            group.exchanger = Exchanger("symm", group)
            group.exchanger._kernels[heads, width, dtype] = kernel

    def play(self, step: Callable[[int, Any], torch.Tensor]) -> list[torch.Tensor]:
        """What step(rank, group) returns on each rank, once all have sent."""
        for phase in (SEND, RECEIVE):
            for kernel in self.kernels:
                kernel.phase = phase
            results = [step(rank, group) for rank, group in enumerate(self.groups)]
        return results


@kernels
@pytest.mark.parametrize("size", [2, 4])
def test_latents_come_heads_first(size: int) -> None:
    """MLA's merge function: base 2 or natural, any strides, [own heads, B, D] in one piece."""
    B, H, D = 3, 8, 64
    ranks = Ranks(size, H, D, torch.float32)
    x = torch.randn(H, size * B, D, device=DEVICE).transpose(0, 1)
    lse = torch.randn(size * B, H, device=DEVICE) * 3
    poison(x, lse)
    want, _ = expected(x, lse, size)
    for base_e in (True, False):
        own = lse if base_e else lse / torch.tensor(2.0).log()
        results = ranks.play(
            lambda rank, group, own=own, base_e=base_e: comm.cp_lse_ag_out_rs_mla(
                x.chunk(size)[rank], own.chunk(size)[rank], group, is_lse_base_on_e=base_e
            )
        )
        assert all(result.is_contiguous() for result in results)
        assert relative_error(torch.cat(results).transpose(0, 1), want) < 2e-6


@kernels
@pytest.mark.parametrize("size", [2, 4])
def test_values_are_projected_before_they_leave(size: int) -> None:
    """MLA's rows in base 2 or natural, some of them empty and holding anything."""
    B, H, D, V = 3, 8, 64, 16
    ranks = Ranks(size, H, V, torch.float32)
    x = torch.randn(size * B, H, D, device=DEVICE)
    lse = torch.randn(size * B, H, device=DEVICE) * 3
    w_vc = torch.randn(H, V, D, device=DEVICE).transpose(1, 2)  # as models hold it
    poison(x, lse)
    want = torch.einsum("bhd,hdv->bhv", expected(x, lse, size)[0], w_vc.double())
    for base2 in (False, True):
        own = lse / torch.tensor(2.0).log() if base2 else lse
        results = ranks.play(
            lambda rank, group, own=own, base2=base2: own_values(
                x.chunk(size)[rank].flatten(1), own.chunk(size)[rank], w_vc, group.exchanger, base2
            )
        )
        assert relative_error(torch.cat(results, 1), want.flatten(1)) < 2e-6
        assert {form for kernel in ranks.kernels for form in kernel.forms} == {"rows"}


@kernels
@pytest.mark.parametrize("splits", [4, 12])
def test_splits_are_merged_and_projected_before_they_leave(splits: int) -> None:
    """Of Triton's decode of MLA."""
    size, heads, width, rope, value = 2, 8, 512, 64, 128
    ranks = Ranks(size, heads, value, torch.float32)
    cache = Cache(size, 1, width, rope)
    q = torch.randn(len(LENGTHS), heads, width + rope, device=DEVICE)
    w_vc = torch.randn(heads, width, value, device=DEVICE)
    layer = attention_layer(heads, width, rope, 1.0)
    backends = [
        cache.backend(rank, group, heads, splits) for rank, group in enumerate(ranks.groups)
    ]

    def step(rank: int, group: Any) -> torch.Tensor:
        given = backends[rank].forward_decode(
            q[..., :width],
            *(None, None, layer, SimpleNamespace()),
            save_kv_cache=False,
            q_rope=q[..., width:],
            k_rope=None,
        )
        # Base 2 would be that of another backend's LSE.
        return own_values(*given, w_vc, group.exchanger, base2=True)

    want = torch.einsum("bhd,hdv->bhv", cache.attended(q), w_vc.double()).flatten(1)
    results = torch.cat(ranks.play(step), dim=1)
    assert not results[0].any()
    assert relative_error(results, want) < (5e-6 if DEVICE == "cpu" else 5e-3)


LENGTHS = (0, 1, 33, 200)


class Cache:
    """Keys and values of a few requests, of which a rank holds every size-th token.

    With a rope it is MLA's: one head, whose keys end with the rope and begin with the values.
    """

    def __init__(self, size: int, kv_heads: int, width: int, rope: int = 0) -> None:
        self.k, self.v = (
            [torch.randn(length, kv_heads, width + rope, device=DEVICE) for length in LENGTHS]
            for _ in range(2)
        )
        if rope:
            self.v = [k[..., :width] for k in self.k]
        self.size = size

    def attended(self, q: torch.Tensor) -> torch.Tensor:
        """[B, H, D] in float64; zero for a request without tokens."""
        rows = []
        for query, k, v in zip(q.double(), self.k, self.v, strict=True):
            group = q.shape[1] // k.shape[1]
            keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
            logits = torch.einsum("hd,thd->ht", query, keys) * q.shape[-1] ** -0.5
            rows.append(torch.einsum("ht,thd->hd", logits.softmax(-1), values))
        return torch.stack(rows)

    def backend(self, rank: int, group: Any, heads: int, splits: int) -> ShardedTritonAttnBackend:
        own_k, own_v = ([t[rank :: self.size] for t in part] for part in (self.k, self.v))
        lens = torch.tensor([len(part) for part in own_k])
        B, D = len(lens), self.v[0].shape[-1]
        adapter = object.__new__(ShardedTritonAttnBackend)
        adapter.shard, adapter.kvp_group, adapter.heads = KVShard(self.size, rank), group, heads
        adapter.exchanger, adapter.base2 = group.exchanger, False
        adapter.mla = adapter.use_mla = self.k[0].shape != self.v[0].shape
        keys, values = torch.cat(own_k), torch.cat(own_v)
        adapter.token_to_kv_pool = SimpleNamespace(
            get_key_buffer=lambda layer: keys, get_value_buffer=lambda layer: values
        )
        indptr = torch.zeros(B + 1, dtype=torch.int32)
        indptr[1:] = lens.cumsum(0)
        plan = SplitPlan(heads, keys.shape[1], 1 << 20, BLOCK, splits, Tile())
        assert plan.capacity(B) == splits
        adapter.scratch = Scratch(plan, B, D, 0, DEVICE)
        # What no split writes holds anything: nothing of it may reach the result.
        adapter.scratch.out.fill_(float("nan"))
        adapter.scratch.lse.fill_(50.0)
        adapter.forward_metadata = SimpleNamespace(
            kv_indptr=indptr.to(DEVICE),
            kv_indices=torch.arange(len(keys), device=DEVICE),
            num_kv_splits=torch.tensor([1, splits, 2, splits], dtype=torch.int32, device=DEVICE),
        )
        return adapter


def attention_layer(heads: int, width: int, rope: int, v_scale: float) -> Any:
    return SimpleNamespace(
        tp_q_head_num=heads,
        qk_head_dim=width + rope,
        v_head_dim=width,
        scaling=(width + rope) ** -0.5,
        logit_cap=0.0,
        logit_capping_method="tanh",
        layer_id=0,
        k_scale=torch.tensor(1.0),
        v_scale=torch.tensor(v_scale),
        k_scale_float=1.0,
        v_scale_float=v_scale,
        xai_temperature_len=-1,
        sliding_window_size=-1,
    )


@kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rope", "v_scale", "splits"),
    [
        (8, 2, 16, 0, 1.0, 4),
        (4, 4, 16, 0, 0.5, 4),
        (8, 1, 512, 64, 1.0, 4),
        (8, 2, 16, 0, 0.5, 12),
        (8, 1, 512, 64, 1.0, 12),
    ],
)
def test_splits_leave_for_their_owners(
    heads: int,
    kv_heads: int,
    width: int,
    rope: int,
    v_scale: float,
    splits: int,
) -> None:
    """A whole decode step: attention's first stage, then one launch (two for many splits)."""
    size = 2
    ranks = Ranks(size, heads, width, torch.float32)
    cache = Cache(size, kv_heads, width, rope)
    q = torch.randn(len(LENGTHS), heads, width + rope, device=DEVICE)
    layer = attention_layer(heads, width, rope, v_scale)
    backends = [
        cache.backend(rank, group, heads, splits) for rank, group in enumerate(ranks.groups)
    ]

    def step(rank: int, group: Any) -> torch.Tensor:
        def decode(q: torch.Tensor, **parts: torch.Tensor | None) -> Any:
            return backends[rank].forward_decode(
                q, None, None, layer, SimpleNamespace(), save_kv_cache=False, **parts
            )

        if not rope:
            return decode(q.flatten(1)).view(len(q), heads // size, width)
        # As the model does: it shapes the output, passes on the LSE, and multiplies heads first.
        out, lse = decode(q[..., :width], q_rope=q[..., width:], k_rope=None)
        merged = comm.cp_lse_ag_out_rs_mla(
            out.view(-1, heads, width), lse, group, is_lse_base_on_e=True
        )
        assert merged.is_contiguous()
        return merged.transpose(0, 1).view(-1, heads // size, width)

    want = cache.attended(q) * v_scale
    results = torch.cat(ranks.play(step), dim=1)
    assert not results[0].any()
    # On a GPU the first stage multiplies in TF32.
    assert relative_error(results, want) < (5e-6 if DEVICE == "cpu" else 5e-3)
    if DEVICE == "cuda":
        ranks.kernels[0].phase = SEND  # no rank answers now
        launches = measure.launches(lambda: step(0, ranks.groups[0]))
        joined = 1 if rope else 0  # the two parts of MLA's query
        merged_first = 0 if splits <= 8 else 1
        assert launches - joined - merged_first == 2, "attention's first stage, and the exchange"

    # The same through the merge that other exchanges take.
    partials = [
        combine_splits(backend.partial_decode(q, layer, SimpleNamespace()), torch.float32)
        for backend in backends
    ]
    merged, _ = expected(
        torch.cat([out for out, _ in partials]), torch.cat([lse for _, lse in partials]), 2
    )
    assert relative_error(results, merged) < 5e-6


@kernels
@pytest.mark.parametrize("splits", [4, 12])
@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"), [(2, 8, 2), (2, 4, 4), (2, 8, 1), (4, 8, 2), (3, 6, 2)]
)
def test_drafts_over_their_prefix_leave_for_their_owners(
    size: int, heads: int, kv_heads: int, splits: int
) -> None:
    """The prefix part of a verify pass: decode's first stage over heads and drafts, one exchange.

    Few splits are reduced by it, as decode's are. Where heads of one key-value head are cut between
    ranks, and whole groups of them are not, they are merged first.
    """
    width, drafts, B = 16, 3, len(LENGTHS)
    ranks = Ranks(size, heads, width, torch.float32, drafts * B)
    cache = Cache(size, kv_heads, width)
    q = torch.randn(B, drafts, heads, width, device=DEVICE)
    layer = attention_layer(heads, width, 0, 1.0)
    layer.tp_k_head_num = kv_heads
    batch = SimpleNamespace(forward_mode=ForwardMode.TARGET_VERIFY)
    backends = []
    for rank, group in enumerate(ranks.groups):
        backend = cache.backend(rank, group, heads * drafts, splits)
        backend.heads, backend.drafts = heads, drafts
        backends.append(backend)

    def step(rank: int, group: Any) -> torch.Tensor:
        backend = backends[rank]
        return backend._own_heads(
            backend.partial_prefix(q.flatten(0, 1), layer, batch), torch.float32
        ).out

    want = torch.stack([cache.attended(q[:, draft]) for draft in range(drafts)], 1)
    results = torch.cat(ranks.play(step), dim=1)
    assert not results[:drafts].any()  # of the request without tokens
    assert relative_error(results, want.flatten(0, 1)) < (5e-6 if DEVICE == "cpu" else 5e-3)
    # In the interpreter each phase is a launch of its own.
    irregular = size == 3
    reduced = splits == 4 and not irregular
    forms = {"splits"} if reduced else {"rows"}
    assert {form for kernel in ranks.kernels for form in kernel.forms} == forms
    if DEVICE == "cuda":
        ranks.kernels[0].phase = SEND  # no rank answers now
        launches = measure.launches(lambda: step(0, ranks.groups[0]))
        copies = 3  # queries, and this rank's outputs and LSEs in another order
        merged = 0 if reduced else 1
        assert launches - copies - merged <= 2, "attention's first stage, and the exchange"


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
