"""Every adapter of the table against unsharded attention in float64.

A record is tested by being there: each of the series' own classes, built as `conformance.py` has
it, attends what `steps.py` has the torch reference attend, and reads what a captured graph would.
Verify passes: `test_conformance_drafts.py`.
"""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_helix.srt.layers.attention.adapters import Attention, adapter
from sglang_helix.srt.layers.attention.seen import seen
from sglang_helix.srt.layers.attention.sharded_paged import ShardedPagedAttention
from sglang_helix.srt.layers.attention.torch_reference import partial_attention
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits
from srt.fresh import Fresh
from srt.layers.attention import steps
from srt.layers.attention.conformance import (
    CAPTURED,
    CASES,
    CONTEXT,
    NARROW,
    OWN,
    QUANTIZED,
    VERIFIED,
    NoSync,
    as_captured,
    build,
    parallel,
    prepare,
)
from srt.layers.attention.steps import Heads, Step
from srt.slots import Slots
from srt.threads import ThreadGroup, run_threads


def failures(backend: str, attention: Attention, page: int) -> list[str]:
    """In a process of its own: what went wrong in which case."""
    prepare(backend)
    mla = attention == "MLA"
    steps.backend_of = lambda *args, **kwargs: build(backend, *args, **kwargs)
    wrong = []
    cases = (NARROW if backend == "triton" else CASES)[attention]
    cut = () if mla or not adapter(backend).windows else ("cut windows",)
    for (ranks, heads), exchange in itertools.product(cases, ("a2a", "ag_rs", *cut)):
        window = 4 * ranks if exchange in cut else 0
        layout = parallel(ranks, "a2a" if window else exchange)
        sinks = None
        if mla:
            outputs = run_threads(steps.mla_on_rank, ranks, heads, page, exchange, **layout)
        else:
            replicated = exchange == "a2a"
            sinks = None if replicated else steps.sinks_of(heads)
            given = heads, page, replicated, not replicated, window
            outputs = run_threads(steps.gqa_on_rank, ranks, *given, **layout)
        try:
            tokens = steps.random_tokens(heads, int(mla), mla)
            steps.check(outputs, tokens, sinks, window)
        except AssertionError as difference:
            wrong.append(f"{ranks} ranks, {heads}, page {page}, {exchange}: {difference}")
    return wrong


@pytest.mark.parametrize(("backend", "attention"), OWN)
def test_attends_what_an_unsharded_cache_would(
    process: Fresh, backend: str, attention: Attention
) -> None:
    pages = (4,) if backend == "triton" else adapter(backend).pages or (1, 16)
    for page in pages:
        assert process.value(failures, backend, attention, page) == []


# Whose stand-ins check that the work was dealt out for the batch at hand.
LENGTHS = (1, 2, 3, 40, 17, 64)
BATCHES = ([3, 0, 5, 4], [1, 4], [5, 2, 0])  # of one graph of four requests, padded


def with_fp8_probabilities(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """What Triton's decode of a few tokens [t, G, D] in fp8 says in the interpreter: [1, H, D].

    Its probabilities, the highest 1, are fp8 too, and the interpreter's cast, which rounds up
    without a carry, halves some of them. So they are cast by the interpreter here.
    """
    import triton.language as tl
    from triton.runtime.interpreter import _convert_float, _ir

    grouped = q.view(keys.shape[1], -1, q.shape[-1])
    scores = torch.einsum("ghd,tgd->ght", grouped, keys) * scale
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    cast = _convert_float(p.numpy(), tl.float32, tl.float8e4nv, _ir.ROUNDING_MODE.RTNE)
    held = torch.from_numpy(cast).view(torch.float8_e4m3fn).float()
    out = torch.einsum("ght,tgd->ghd", held, values) / p.sum(-1, keepdim=True)
    return out.flatten(0, 1)[None]


def replays_on_rank(
    rank: int,
    group: ThreadGroup,
    backend: str,
    heads: Heads,
    page: int,
    mla: bool,
    dtype: torch.dtype,
    window: int = 0,
) -> list[str]:
    """A decode graph is captured for padding alone; what it reads is refreshed for others."""
    generator = torch.Generator().manual_seed(rank)
    slots = Slots(group.world_size, page, pages=40)
    for request, length in enumerate(LENGTHS):
        slots.extend(request, length)
    adapter_ = build(backend, rank, group, heads, slots, mla, dtype, window)
    adapter_.req_to_token_pool.req_to_token = slots.table()
    pool, shard = adapter_.token_to_kv_pool, KVShard(group.world_size, rank)
    held = [shard.read_rows(torch.tensor(slots.of[request])) for request in range(len(LENGTHS))]
    for rows in held:
        for part in (pool.keys, pool.values):
            part[rows] = torch.randn(len(rows), *part.shape[1:], generator=generator).to(dtype)

    def batch(requests: list[int]) -> Any:
        padding = 4 - len(requests)  # request 0, one token long, without a slot
        lens = torch.tensor([LENGTHS[r] for r in requests] + [1] * padding)
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=4,
            req_pool_indices=torch.tensor(requests + [0] * padding),
            seq_lens=lens,
            seq_lens_cpu=lens.clone(),
            out_cache_loc=torch.tensor([slots.of[r][-1] for r in requests], dtype=torch.int64),
            spec_info=None,
            encoder_lens=None,
            kv_loc_plan=None,
        )

    adapter_.init_cuda_graph_state(8, 8)
    adapter_.init_forward_metadata_out_graph(batch([]), in_capture=True)
    adapter_.init_forward_metadata_in_graph(as_captured(batch([])))
    captured = dict(vars(adapter_))
    scheduled = (backend, mla) in [("fa3", False), ("flashmla", True)]
    assert (captured.get("schedule") is not None) == scheduled
    if isinstance(adapter_, ShardedPagedAttention):
        width = adapter_.pages.table.shape[1]
        assert width == -(-CONTEXT // slots.page), "as wide as a rank needs: splits follow from it"
    layer = steps.layer_of(heads.queries, heads.kv, heads, window)
    # Of any so many tokens in a row each rank holds as many.
    seen_rows = [rows[-window // shard.size if window else 0 :] for rows in held]
    scale = 1.0 if dtype == torch.float32 else 0.5
    if scale != 1.0:
        layer.k_scale = layer.v_scale = torch.tensor([scale])
        layer.k_scale_float = layer.v_scale_float = scale
    wrong = []
    for requests in BATCHES:
        at_hand = batch(requests)
        with NoSync.over(at_hand, adapter_):
            adapter_.init_forward_metadata_out_graph(at_hand)
        vars(adapter_).update(captured)  # what the graph reads
        in_graph = as_captured(at_hand)
        with NoSync.over(in_graph, adapter_):
            adapter_.init_forward_metadata_in_graph(in_graph)
        if not mla:
            ends = [slots.of[request][-1] for request in requests]
            written = {row for row in adapter_.write_rows.tolist() if row >= page}
            assert written == {end // shard.size for end in ends if end % shard.size == rank}
        # What a cache in fp8 may have its queries rounded to.
        q = torch.randn(4, heads.queries, heads.k_width, generator=generator).to(dtype).float()
        queries = q
        if mla:
            parts = q[..., : heads.v_width], q[..., heads.v_width :]
            queries = adapter_.mla_queries(*parts, layer)
        partial = adapter_.partial_decode(queries, layer, batch(requests))
        forms = {"splits": Splits, "masked rows": Masked}
        form = forms.get(adapter(backend).leaves, Partial)
        if not isinstance(partial, form):
            wrong.append(f"rank {rank}: {type(partial).__name__} in place of {form.__name__}")
        partial = partial.marked() if isinstance(partial, Masked) else partial
        out, lse = combine_splits(partial, q.dtype) if isinstance(partial, Splits) else partial
        for row, request in enumerate(requests):
            keys, values = (
                buffer.float()[seen_rows[request]] * scale
                for buffer in (pool.get_key_buffer(0), pool.get_value_buffer(0))
            )
            want = partial_attention(q[row : row + 1], keys, values, scale=layer.scaling)
            if not len(keys):
                if lse[row].isfinite().any():
                    wrong.append(f"rank {rank}: request {request} has no tokens, LSE {lse[row]}")
                continue
            if backend == "triton" and dtype == torch.float8_e4m3fn:
                out_ = with_fp8_probabilities(q[row], keys, values, layer.scaling)
                want = want._replace(out=out_)
            natural = lse[row] * (math.log(2) if adapter(backend).base2 else 1.0)
            error = float((out[row] - want.out[0]).norm() / want.out.norm())
            of_lse = float((natural - want.lse[0]).abs().max())
            # Over fp8, in one of some hundred processes, a thread's first attention was off by 4e-5
            # from what it computed next of the same rows. A row less moves both by some 1e-1.
            bound = 1e-5 if dtype == torch.float32 else 1e-4
            allowed = bound if out.dtype == torch.float32 else 5e-3
            if not (error < allowed and of_lse < bound):
                wrong.append(f"rank {rank}, {requests}: {request}: {error:.1e}, LSE {of_lse:.1e}")
    if not mla and backend != "triton":  # upstream's own metadata is beside theirs
        for step in (Step("decode", {0: 1, 1: 1}), Step("extend", {3: 5, 6: 4, 1: 2})):
            eager, _ = steps.forward_batch(step, slots)
            adapter_.req_to_token_pool.req_to_token = slots.table()
            with NoSync.over(eager, adapter_):
                adapter_.init_forward_metadata(eager)
    return wrong


@pytest.mark.parametrize(
    "waits",
    [
        torch.Tensor.cpu,
        torch.Tensor.nonzero,
        lambda lens: (torch.zeros(2, dtype=lens.dtype).copy_(lens)[:1] * 2).tolist(),
        lambda lens: int(lens.max()),
        lambda lens: bool((torch.tensor([3, 4]) == lens).all()),
    ],
)
def test_a_copy_to_the_host_is_seen(waits: Any) -> None:
    lens, on_host = torch.tensor([3, 4]), torch.tensor([3, 4])
    with NoSync(lens):
        assert int(on_host.cpu().max()) == 4
        with pytest.raises(AssertionError, match="waits for the device"):
            waits(lens)


def replay_failures(backend: str, attention: Attention, page: int, dtype: torch.dtype) -> list[str]:
    prepare(backend)
    mla = attention == "MLA"
    heads = Heads(6, 1, 576, 512) if mla else Heads(6, 2, 16, 16)
    given = backend, heads, page, mla, dtype
    found = run_threads(replays_on_rank, 3, *given, **parallel(3))
    if adapter(backend).windows and not mla:
        found += run_threads(replays_on_rank, 3, *given, 15, **parallel(3))
    return list(itertools.chain(*found))


@pytest.mark.parametrize(
    ("backend", "attention", "dtype"),
    [
        *((*case, torch.float32) for case in CAPTURED),
        *((*case, torch.float8_e4m3fn) for case in QUANTIZED),
    ],
    ids=str,
)
def test_captured_metadata_is_refreshed_in_place(
    process: Fresh, backend: str, attention: Attention, dtype: torch.dtype
) -> None:
    page = (adapter(backend).pages or (4,))[0]
    assert process.value(replay_failures, backend, attention, page, dtype) == []


def test_the_matrix_says_what_runs_here() -> None:
    ran = {"extend": OWN, "graph": CAPTURED, "fp8": QUANTIZED, "verify": VERIFIED}
    for case in OWN:
        assert seen(*case, "CPU") == {feature for feature, cases in ran.items() if case in cases}
    assert all("verify" in seen(*case, "CPU") for case in VERIFIED)
