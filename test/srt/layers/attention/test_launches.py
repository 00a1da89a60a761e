"""How often a layer of attention launches something, for every adapter of the table.

From q_proj to o_proj, for MLA from the absorbed queries to the value projection. Kernels are
stand-ins, or Triton's in the interpreter: each is one launch, as are a collective of the group, the
pool's store and the kernels of the exchange, which here leave nothing behind. A cache in bf16, as
the model.

And what a captured decode step has the host launch outside of its graph: a step of a small batch
takes as long as the host does, and each launch is several microseconds of it. Lists of pages, which
are one launch on a GPU, and of rows count as one.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_cpu_reference.stand_ins import kernel as stand_ins
from sglang_helix.srt.layers.attention import owned_rows
from sglang_helix.srt.layers.attention.adapters import Attention, adapter
from sglang_helix.srt.layers.attention.local_pages import LocalPages
from sglang_helix.srt.layers.dcp import comm, lse_combine, lse_combine_triton
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits
from sglang_helix.srt.models.value_projection import own_values
from srt.fresh import Fresh
from srt.layers.attention import steps
from srt.layers.attention.conformance import CAPTURED, build, parallel, prepare
from srt.layers.attention.launches import Launches
from srt.layers.attention.steps import Heads, Step
from srt.slots import Slots
from srt.threads import ThreadGroup, get_parallel, run_threads
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

BATCH = 4  # of a step
RANKS, LAYER_HEADS = 2, {"GQA": Heads(8, 2, 64, 64), "MLA": Heads(8, 1, 576, 512)}
OPERATORS = ("fwd", "dense_decode_fwd")  # of sgl-kernel and FlashMLA
EXCHANGES = {
    "a2a": ["pack", "all_to_all", "combine"],
    "symm": ["symm"],
    "symm, queries too": ["symm"],
}


def note(name: str) -> None:
    """One launch, if somebody counts here."""
    if isinstance(mode := _get_current_dispatch_mode(), Launches):
        mode.names.append(name)


class Group(ThreadGroup):
    """A rank's group whose collectives leave nothing behind."""

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        note("all_gather")
        assert input_.is_contiguous()
        return input_.new_empty(self.world_size * len(input_), *input_.shape[1:])

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        note("all_to_all")


class Symm:
    """In the place of a kernel that was prepared."""

    max_tokens = 64

    def __call__(self, partial: Partial | Splits | Masked, **options: Any) -> Partial:
        note("symm")
        tokens, heads, width = (partial.out.shape[n] for n in (0, 1, -1))
        own = heads // RANKS
        return Partial(
            torch.empty(tokens, own, width, dtype=torch.bfloat16), torch.empty(tokens, own)
        )


class SymmGather:
    """In the place of one that gathers queries."""

    max_tokens = 64

    def __call__(self, parts: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
        note("gather")
        tokens, own, _ = parts[0].shape
        return parts[0].new_empty(tokens, RANKS * own, sum(part.shape[-1] for part in parts))


def counted_on_rank(
    rank: int, group: ThreadGroup, backend: str, attention: Attention, exchange: str
) -> dict[str, list[str]]:
    """The launches of a layer's decode and extend, by what is asked for."""
    mla, heads = attention == "MLA", LAYER_HEADS[attention]
    own, dtype = heads.queries // RANKS, torch.bfloat16
    silent: Any = Group(rank, RANKS, None, [])  # type: ignore[arg-type]
    get_parallel().dcp_group = silent
    silent.exchanger = Exchanger(exchange.split(",")[0], silent)
    if exchange != "a2a":
        for width in (heads.v_width, 128):
            silent.exchanger._kernels[heads.queries, width, dtype] = Symm()
    if exchange == "symm, queries too":
        widths = (heads.v_width, heads.k_width - heads.v_width) if mla else (heads.k_width,)
        silent.exchanger._gathers[heads.queries, widths, dtype] = SymmGather()
    page = (adapter(backend).pages or (4,))[0]
    slots = Slots(RANKS, page, pages=40)
    backend_ = build(backend, rank, silent, heads, slots, mla, dtype, of_model=dtype)
    pool = backend_.token_to_kv_pool
    for name in ("set_kv_buffer", "set_mla_kv_buffer"):
        setattr(pool, name, lambda *args: note("store"))
    for part in (pool.keys, pool.values):
        part.zero_()
    for request, length in enumerate((9, 5, 70)):
        slots.extend(request, length)
    found: dict[str, list[str]] = {}

    def count(what: str, step: Step, prepared: Callable[..., Any], made: int) -> None:
        batch, order = steps.forward_batch(step, slots)
        backend_.req_to_token_pool.req_to_token = slots.table()
        backend_.init_forward_metadata(batch)
        run = prepared(batch, len(order), made)
        run()  # what is made once
        with Launches() as launches:
            run()
        found[what] = ["attend" if name in OPERATORS else name for name in launches.names]

    def grouped(batch: Any, tokens: int, made: int) -> Callable[[], Any]:
        # As the projection leaves them: queries, keys and values of a token in one row.
        q, kv = made * heads.k_width, heads.kv * heads.k_width
        rows = torch.zeros(tokens, q + 2 * kv, dtype=dtype).split([q, kv, kv], dim=1)
        k, v = (part.unflatten(1, (heads.kv, -1)) for part in rows[1:])
        decode = batch.forward_mode.is_decode()
        attend = backend_.forward_decode if decode else backend_.forward_extend
        layer = steps.layer_of(made, heads.kv, heads)
        return lambda: attend(rows[0], k, v, layer, batch)

    def absorbed(batch: Any, tokens: int, made: int, first: bool = False) -> Callable[[], Any]:
        # As the absorbing product and the rotary embedding leave them.
        queries = (
            torch.zeros(made, tokens, 512, dtype=dtype).transpose(0, 1),
            torch.zeros(tokens, made, 192, dtype=dtype)[..., 128:],
        )
        k, k_rope = (torch.zeros(tokens, 1, width, dtype=dtype) for width in (512, 64))
        layer = steps.layer_of(heads.queries, 1, heads)
        w_vc = torch.zeros(heads.queries, 512, 128, dtype=dtype)

        def run() -> Any:
            q, rope = queries
            if made == own:
                q, rope = comm.all_gather_q_for_mla_decode(q, rope)
            rest = layer, batch
            out, lse = backend_.forward_decode(q, k, k, *rest, q_rope=rope, k_rope=k_rope)
            if first:
                own_values(out, lse, w_vc, silent.exchanger, backend_.base2)
            elif exchange == "a2a":
                comm.dcp_a2a_lse_reduce(lambda *_: None, out, lse, silent)
            else:
                comm.cp_lse_ag_out_rs_mla(out, lse, silent, is_lse_base_on_e=True)

        return run

    decode = Step("decode", {0: 1, 1: 1, 2: 1})
    new = iter([{4: 3, 5: 2}, {6: 3, 7: 2}])
    for queries, made in {"gathered": own, "replicated": heads.queries}.items():
        if mla:
            count(f"decode, {queries}", decode, absorbed, made)
            count(f"values first, {queries}", decode, partial(absorbed, first=True), made)
        else:
            count(f"decode, {queries}", decode, grouped, made)
            count(f"extend, {queries}", Step("extend", {0: 3, 3: 2, 1: 4}), grouped, made)
            count(f"new prompts, {queries}", Step("extend", next(new)), grouped, made)
    return found


def counted(backend: str, attention: Attention) -> dict[str, dict[str, list[str]]]:
    """Of rank 1, in a process of its own, by exchange."""
    prepare(backend)
    disable = stand_ins._disable_current_modes

    def launched() -> Any:
        note("attend")
        return disable()

    stand_ins._disable_current_modes = launched
    for name in dir(lse_combine_triton):
        if name.endswith("_kernel"):
            short = name.removeprefix("_").removesuffix("_kernel")
            setattr(lse_combine_triton, name, Noted(short))
    lse_combine._runs_triton = lambda x: True
    if os.environ.get("TRITON_INTERPRET"):
        from triton.runtime.interpreter import GridExecutor

        GridExecutor.__call__ = lambda *args, **kwargs: note("attend")
    found = {}
    for exchange in EXCHANGES:
        given = backend, attention, exchange
        options = parallel(RANKS, exchange.split(",")[0])
        found[exchange] = run_threads(counted_on_rank, RANKS, *given, **options)[1]
    return found


class Noted:
    """In the place of one of Triton's kernels."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: note(self.name)


def expected(backend: str, attention: Attention, exchange: str) -> dict[str, list[str]]:
    """What there is to launch, in order.

    Queries are gathered by NCCL, from a copy with the heads in front, or by a kernel that leaves no
    gaps. FlashInfer's kernels want queries without, and its prefix part fills its output with
    zeros. MLA's kernels of FlashMLA and Triton want both parts of a query as one.
    """
    flashinfer, triton = backend in ("flashinfer", "trtllm_mha"), backend == "triton"
    by_kernel = exchange == "symm, queries too"
    # Splits are merged where they are sent, or else before that.
    merged = ["combine_splits"] if triton else []
    sent = [*(merged if exchange == "a2a" else []), *EXCHANGES[exchange]]
    found = {}
    for queries in ("gathered", "replicated"):
        gathered = queries == "gathered"
        own = [*(["clone"] if flashinfer else []), "attend"]
        attend = ["attend"] if gathered and by_kernel else own
        if attention == "MLA":
            join = [] if gathered or backend in ("fa3", "fa4") else ["cat"]
            gather = ["gather"] if by_kernel else ["cat", "all_gather"]
            decode = [*(gather if gathered else []), "store", *join, *attend]
            found[f"decode, {queries}"] = [*decode, *sent]
            projected = [*decode, *merged, "bmm", *EXCHANGES[exchange]]
            found[f"values first, {queries}"] = projected
            continue
        gather = ["gather"] if by_kernel else ["clone", "all_gather"]
        gather = gather if gathered else []
        # What TRT-LLM's kernel cannot mark, `symm` does.
        masked = backend == "trtllm_mha" and exchange == "a2a"
        mask = ["masked_fill"] if masked else []
        found[f"decode, {queries}"] = ["store", *gather, *attend, *mask, *sent]
        prefix = [*attend[:-1], *(["zeros"] if flashinfer else []), "attend", *EXCHANGES[exchange]]
        found[f"extend, {queries}"] = [*own, *gather, *prefix, "store", "merge"]
        found[f"new prompts, {queries}"] = [*own, "store"]
    return found


@pytest.mark.parametrize(("backend", "attention"), CAPTURED)
def test_launches_of_a_layer(process: Fresh, backend: str, attention: Attention) -> None:
    """At most 12 of an extend. Of a decode by `symm` at most 4, unless NCCL gathers queries."""
    found = process.value(counted, backend, attention)
    assert found == {name: expected(backend, attention, name) for name in EXCHANGES}
    if attention == "GQA":
        assert len(found["a2a"]["extend, gathered"]) <= 12
    assert len(found["symm"]["decode, replicated"]) <= 4
    assert len(found["symm, queries too"]["decode, gathered"]) <= 4


def as_one_launch(owner: Any, name: str, noted_as: str) -> None:
    """Have a function noted as one launch, whatever it does on a CPU."""
    original = getattr(owner, name)

    def noted(*args: Any, **options: Any) -> Any:
        note(noted_as)
        with _disable_current_modes():
            return original(*args, **options)

    setattr(owner, name, noted)


def prepared_on_rank(
    rank: int, group: ThreadGroup, backend: str, heads: Heads, mla: bool
) -> dict[str, list[str]]:
    """What one step launches, of a full batch and of a padded one."""
    page = (adapter(backend).pages or (4,))[0]
    slots = Slots(group.world_size, page, pages=40)
    for request in range(BATCH):
        slots.extend(request, 5 + request)
    adapter_ = build(backend, rank, group, heads, slots, mla)
    adapter_.req_to_token_pool.req_to_token = slots.table()

    def batch(real: int) -> Any:
        lens = torch.tensor([len(slots.of[request]) for request in range(BATCH)])
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=BATCH,
            req_pool_indices=torch.arange(BATCH),
            seq_lens=lens,
            seq_lens_cpu=lens.clone(),
            out_cache_loc=torch.tensor([slots.of[r][-1] for r in range(real)]),
            spec_info=None,
            encoder_lens=None,
            kv_loc_plan=None,
        )

    adapter_.init_cuda_graph_state(8, 8)
    adapter_.init_forward_metadata_out_graph(batch(BATCH), in_capture=True)
    adapter_.init_forward_metadata_in_graph(batch(BATCH))
    found = {}
    for name, real in {"full": BATCH, "padded": BATCH - 1}.items():
        at_hand = batch(real)
        with Launches() as launches:
            adapter_.init_forward_metadata_out_graph(at_hand)
        found[name] = launches.names
    return found


def prepared(backend: str, attention: Attention) -> dict[str, list[str]]:
    """Of rank 1, in a process of its own."""
    prepare(backend)
    as_one_launch(LocalPages, "fill", "pages")
    as_one_launch(owned_rows, "local_rows", "rows")
    if os.environ.get("TRITON_INTERPRET"):
        from triton.runtime.interpreter import GridExecutor

        as_one_launch(GridExecutor, "__call__", "kernel")
    given = backend, LAYER_HEADS[attention], attention == "MLA"
    return run_threads(prepared_on_rank, RANKS, *given, **parallel(RANKS))[1]


READS = {
    # On the host, which plans by it: a plan is of what each request has on this rank.
    "flashinfer": ["add", "floor_divide", "lift_fresh", "rows"],
    # Upstream's own metadata of a decode step, but for the tokens that a rank has of each request.
    "triton": ["add", "floor_divide", "cumsum", "copy_", "kernel", "clamp_min", "kernel"],
}


@pytest.mark.parametrize(("backend", "attention"), CAPTURED)
def test_launches_of_a_step(process: Fresh, backend: str, attention: Attention) -> None:
    """The graph prepares what it can for itself."""
    found = process.value(prepared, backend, attention)
    assert found["full"] == found["padded"]
    assert sorted(found["full"]) == sorted(READS.get(backend, []))
