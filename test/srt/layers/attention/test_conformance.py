"""Every adapter of the table against unsharded attention in float64.

A record is tested by being there: each of the series' own classes is built by its own constructor
and attends what `steps.py` has the torch reference attend, its ranks threads, its kernels
stand-ins, or Triton's in the interpreter. Pool rows are NaN until they are written.
"""

import itertools
import math
import os
import pkgutil
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.spec_info import SpecInputType
from sglang_cpu_reference.stand_ins.kernel import on_the_device
from sglang_helix.srt.layers.attention import triton_backend
from sglang_helix.srt.layers.attention.adapters import ADAPTERS, Attention, adapter
from sglang_helix.srt.layers.attention.seen import seen
from sglang_helix.srt.layers.attention.sharded_paged import ShardedPagedAttention
from sglang_helix.srt.layers.attention.torch_native_backend import partial_attention
from sglang_helix.srt.layers.dcp import comm, planner
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits
from sglang_helix.srt.layers.dcp.ownership import KVShard
from sglang_helix.srt.layers.dcp.partial import Splits
from srt.fresh import Fresh
from srt.layers.attention import steps, test_verify
from srt.layers.attention.steps import Heads, LatentPool, Pool, Step
from srt.slots import Slots
from srt.threads import ThreadGroup, get_parallel, run_threads
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

CONTEXT = 128  # tokens of a request, at most
REQUESTS = 8

CASES: dict[Attention, list[tuple[int, Heads]]] = {
    # Ranks and heads, of widths that every kernel has: one key-value head, a few, groups that
    # ranks cut through, as many as queries.
    "GQA": [
        (2, Heads(4, 1, 16, 16)),
        (3, Heads(6, 2, 16, 16)),
        (4, Heads(8, 2, 64, 64)),
        (2, Heads(8, 8, 16, 16)),
    ],
    "MLA": [(2, Heads(4, 1, 576, 512)), (4, Heads(8, 1, 576, 512))],
}
# The interpreter is slow: of Triton's kernels one of each.
NARROW: dict[Attention, list[tuple[int, Heads]]] = {
    "GQA": [(2, Heads(6, 2, 16, 16))],
    "MLA": [(2, Heads(4, 1, 288, 256))],
}
OWN = [
    (record.name, attention)
    for record in ADAPTERS
    for attention in ("GQA", "MLA")
    if record.own_class(attention)
]


# Modules in which a thread is a rank.
RANKED = ("sglang_helix.", "sglang.srt.layers.attention.", "sglang.srt.layers.dcp.")


@pytest.fixture
def process(request: pytest.FixtureRequest, backend: str) -> Fresh:
    """Where the kernels of a backend run on a CPU: stand-ins, or Triton's own interpreted."""
    found: Fresh = request.getfixturevalue("interpreted" if backend == "triton" else "kernels")
    return found


class RequestTable:
    """SGLang's ReqToTokenPool: one tensor for ever, which backends may keep."""

    size = REQUESTS - 1

    def __init__(self) -> None:
        self._table = torch.zeros(REQUESTS, CONTEXT, dtype=torch.int32)

    @property
    def req_to_token(self) -> torch.Tensor:
        return self._table

    @req_to_token.setter
    def req_to_token(self, table: torch.Tensor) -> None:
        self._table[: table.shape[0], : table.shape[1]] = table


def build(
    backend: str,
    rank: int,
    group: ThreadGroup,
    heads: Heads,
    slots: Slots,
    mla: bool,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
) -> Any:
    """A rank's adapter, as SGLang would have it made; dtype is its cache's."""
    shard = KVShard(group.world_size, rank)
    pool = (LatentPool if mla else Pool)(slots.rows, shard, heads)
    pool.keys, pool.values = pool.keys.to(dtype), pool.values.to(dtype)
    name = adapter(backend).own_class("MLA" if mla else "GQA", drafts=True)
    kind = pkgutil.resolve_name(name)
    runner = runner_of(backend, slots.page // shard.size, pool, heads, mla, window)
    if backend == "triton":
        runner.decode_scratch = triton_backend.prepare(runner, REQUESTS, REQUESTS)
    return kind(runner)


def runner_of(backend: str, page_size: int, pool: Any, heads: Heads, mla: bool, window: int) -> Any:
    """What a backend's constructor asks of its ModelRunner."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
    from sglang.srt.runtime_context import get_context

    pool.get_kv_cache_quant_method = UnquantizedKVCacheMethod
    pool.start_layer = 0
    requests = RequestTable()
    model = SimpleNamespace(
        attention_arch=AttentionArch.MLA if mla else AttentionArch.MHA,
        context_len=CONTEXT,
        head_dim=heads.k_width,
        v_head_dim=heads.v_width,
        swa_v_head_dim=heads.v_width,
        kv_lora_rank=heads.v_width,
        qk_nope_head_dim=heads.v_width,
        qk_rope_head_dim=heads.k_width - heads.v_width,
        scaling=heads.k_width**-0.5,
        num_attention_heads=heads.queries,
        get_max_num_attention_heads=lambda: heads.queries,
        get_num_kv_heads=lambda *_: heads.kv,
        hf_text_config=SimpleNamespace(num_attention_heads=heads.queries),
        hf_config=PretrainedConfig(architectures=["LlamaForCausalLM"]),
        is_encoder_decoder=False,
        linear_attn_registry_result=None,
        is_local_attention_model=False,
        is_multimodal=False,
        is_hybrid_swa=False,
        num_hidden_layers=1,
    )
    return SimpleNamespace(
        model_config=model,
        server_args=get_context().server_args,
        use_mla_backend=mla,
        page_size=page_size,
        max_running_requests=REQUESTS,
        device="cpu",
        gpu_id=0,
        dtype=torch.float32,
        kv_cache_dtype=pool.keys.dtype,
        kv_cache_dtype_str="auto" if pool.keys.dtype == torch.float32 else "fp8_e4m3",
        req_to_token_pool=requests,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        kv_index_translator=KVIndexTranslator(
            req_to_token=requests.req_to_token,
            token_to_kv_pool_allocator=None,
            token_to_kv_pool=pool,
            page_size=page_size,
            device="cpu",
        ),
        prefill_attention_backend_str=backend,
        decode_attention_backend_str=backend,
        decode_num_tokens_per_req=lambda: 1,
        model=steps.model_of(heads, window),
        pre_model_load_memory=0.0,
        init_new_workspace=False,
        is_draft_worker=False,
        sliding_window_size=window - 1 if window else None,
        attention_chunk_size=None,
        spec_algorithm=SimpleNamespace(is_dspark=lambda: False, is_frozen_kv_mtp=lambda: False),
    )


def publish(backend: str, **flags: Any) -> None:
    """Resolved flags of a server with this backend, for constructors that ask for them."""
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    publish(
        ServerArgs(
            model_path="dummy",
            attention_backend=backend,
            device="cpu",
            mem_fraction_static=0.5,
            **flags,
        ),
        role="scheduler",
        ranks=SpawnRanks(world_rank=0, gpu_id=0),
    )


def prepare(backend: str, **flags: Any) -> None:
    """In a process of its own: SGLang's backends can be built, and a thread is a rank."""
    publish(backend, **flags)
    for attention in ("GQA", "MLA"):
        if own := adapter(backend).own_class(attention, drafts=True):
            pkgutil.resolve_name(own)  # its module and upstream's are among those below
    for name, module in list(sys.modules.items()):
        if name.startswith(RANKED) and hasattr(module, "get_parallel"):
            module.get_parallel = get_parallel
    planner.get_attn_backend = lambda: steps.TRANSLATING
    if os.environ.get("TRITON_INTERPRET"):
        from triton.runtime.interpreter import GridExecutor

        # The interpreter plays one launch at a time: its state is the module's own.
        launch, turn = GridExecutor.__call__, threading.Lock()

        @on_the_device
        def in_turn(*args: Any, **kwargs: Any) -> None:
            with turn:
                launch(*args, **kwargs)

        GridExecutor.__call__ = in_turn


def parallel(ranks: int, exchange: str = "a2a") -> dict[str, Any]:
    """What a thread's `get_parallel` answers, beside its rank."""
    return {
        "tp_size": ranks,
        "attn_tp_size": ranks,
        "attn_cp_size": 1,
        "attn_dp_enabled": False,
        "enable_prefill_cp": False,
        "dcp_comm_backend": exchange,
    }


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


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        ), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


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
        with NoSync():
            adapter_.init_forward_metadata_out_graph(batch(requests))
        vars(adapter_).update(captured)  # what the graph reads
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
            allowed = 1e-5 if out.dtype == torch.float32 else 5e-3
            if not (error < allowed and of_lse < 1e-5):
                wrong.append(f"rank {rank}, {requests}: {request}: {error:.1e}, LSE {of_lse:.1e}")
    return wrong


def replay_failures(backend: str, attention: Attention, page: int, dtype: torch.dtype) -> list[str]:
    prepare(backend)
    mla = attention == "MLA"
    heads = Heads(6, 1, 576, 512) if mla else Heads(6, 2, 16, 16)
    given = backend, heads, page, mla, dtype
    found = run_threads(replays_on_rank, 3, *given, **parallel(3))
    if adapter(backend).windows and not mla:
        found += run_threads(replays_on_rank, 3, *given, 15, **parallel(3))
    return list(itertools.chain(*found))


# The reference captures nothing.
CAPTURED = [(name, kind) for name, kind in OWN if name != "torch_native"]
# Elsewhere it is refused at start-up.
QUANTIZED = [(name, kind) for name, kind in CAPTURED if kind not in adapter(name).no_fp8]


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


def refusal(backend: str, dtype: torch.dtype) -> str:
    """What an adapter for MLA says of a cache in fp8 that a checkpoint asked for, not a flag."""
    prepare(backend)

    def build_one(rank: int, group: ThreadGroup) -> str:
        with pytest.raises(NotImplementedError) as refused:
            build(backend, rank, group, Heads(4, 1, 576, 512), Slots(2, 64, 9), True, dtype)
        return str(refused.value)

    one, other = run_threads(build_one, 2, **parallel(2))
    assert one == other
    return str(one)


@pytest.mark.parametrize(
    ("backend", "dtype", "instead"),
    [
        ("fa3", torch.float8_e4m3fn, "give --kv-cache-dtype bfloat16, or another --attention-"),
        ("fa4", torch.float8_e4m3fn, "give --kv-cache-dtype bfloat16, or another --attention-"),
        ("flashmla", torch.float8_e5m2, "give --kv-cache-dtype fp8_e4m3 or bfloat16"),
    ],
    ids=str,
)
def test_a_cache_that_would_be_copied_or_misread_is_refused(
    process: Fresh, backend: str, dtype: torch.dtype, instead: str
) -> None:
    said = process.value(refusal, backend, dtype)
    assert backend in said
    assert "--dcp-size > 1" in said
    assert instead in said


def verify_failures(backend: str, attention: Attention) -> list[str]:
    """Trees of drafts, as `test_verify.py` has the torch reference attend them."""
    prepare(backend)
    test_verify.backend_of = lambda *args, **kwargs: build(backend, *args, **kwargs)
    mla, page = attention == "MLA", (adapter(backend).pages or (4,))[0]
    cases = NARROW[attention] if backend == "triton" else CASES[attention][:2]
    if backend == "triton" and not mla:
        # Drafts of 4 heads on each key-value head are no whole tiles of decode's kernel.
        cases = [*cases, (2, Heads(8, 2, 16, 16))]
    wrong = []
    for (ranks, heads), (name, parents) in itertools.product(cases, test_verify.TREES.items()):
        drafts = page, parents, mla
        found = run_threads(test_verify.verify_on_rank, ranks, heads, *drafts, **parallel(ranks))
        tokens = steps.random_tokens(heads, 0, mla)
        wanted = torch.stack(
            [
                test_verify.expected(tokens, request, row.nonzero().flatten())
                for request in test_verify.CACHED
                for row in test_verify.ancestry(parents)
            ]
        )
        error = float((torch.cat(found, dim=1).double() - wanted).norm() / wanted.norm())
        if not error < 1e-5:
            wrong.append(f"{ranks} ranks, {heads}, {name}: {error:.1e}")
    return wrong


# Elsewhere they are refused at start-up, or SGLang's own.
VERIFIED = [
    (record.name, attention)
    for record in ADAPTERS
    for attention in ("GQA", "MLA")
    if record.own_class(attention, drafts=True) and attention not in record.no_drafts
]


@pytest.mark.parametrize(("backend", "attention"), VERIFIED)
def test_drafts_attend_their_ancestors_and_the_prefix(
    process: Fresh, backend: str, attention: Attention
) -> None:
    assert process.value(verify_failures, backend, attention) == []


def captured_drafts_on_rank(
    rank: int,
    group: ThreadGroup,
    backend: str,
    heads: Heads,
    page: int,
    mla: bool,
    parents: tuple[int, ...],
) -> tuple[list[int], torch.Tensor]:
    """A verify graph is captured for padding alone, and replayed for fewer requests than it has.

    Masks come as draft models leave them, and as n-grams do. Padding reads page 0, which is NaN
    again before each replay.

    Returns the requests of all replays and their outputs, [requests * drafts, own heads, Dv].
    """
    tokens, slots = steps.random_tokens(heads, 0, mla), Slots(group.world_size, page, 300)
    drafts, own, latent = len(parents) + 1, heads.queries // group.world_size, heads.v_width
    adapter_ = build(backend, rank, group, heads, slots, mla)
    layer = steps.layer_of(heads.queries if mla else own, heads.kv, heads)
    seen_by = test_verify.ancestry(parents)

    def of(order: list[tuple[int, int]]) -> list[torch.Tensor]:
        return [torch.stack([part[r, t] for r, t in order]) for part in tokens]

    batch, order = steps.forward_batch(Step("extend", test_verify.CACHED), slots)
    _, k, v = of(order)
    adapter_.req_to_token_pool.req_to_token = slots.table()
    if mla:
        adapter_._store_mla(layer, batch, k[..., :latent], k[..., latent:])
    else:
        adapter_.prepare_writes(batch)
        adapter_._store(layer, batch, k, v)

    def replayed(requests: list[int], drafted: SpecInputType) -> Any:
        brought = [slots.extend(request, drafts) for request in requests]
        adapter_.req_to_token_pool.req_to_token = slots.table()
        padding = 4 - len(requests)
        lens = torch.tensor([test_verify.CACHED[r] for r in requests] + [1] * padding)
        masks = [
            torch.cat([seen_by.new_ones(drafts, length), seen_by], 1).flatten()
            for length in lens.tolist()[: len(requests) or 4]  # of those that are not padding
        ]
        mask = torch.cat(masks)
        if drafted == SpecInputType.EAGLE_VERIFY:
            # As SGLang does: written where the backend has it, without columns of cached tokens.
            mask = adapter_.verify_mask.buffer
            mask.fill_(True)
            mask[: len(requests) * drafts**2] = seen_by.flatten().repeat(len(requests))
        return SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=4,
            req_pool_indices=torch.tensor(requests + [REQUESTS - 1] * padding),
            seq_lens=lens,
            seq_lens_cpu=lens.clone(),
            out_cache_loc=torch.tensor([*itertools.chain(*brought)], dtype=torch.int64),
            out_cache_loc_is_physical=False,
            extend_prefix_lens_cpu=None,
            kv_loc_plan=None,
            encoder_lens=None,
            spec_info=SimpleNamespace(
                spec_input_type=drafted,
                draft_token_num=drafts,
                num_tokens_per_req=drafts,
                custom_mask=mask,
            ),
        )

    adapter_.init_cuda_graph_state(8, 8 * drafts)
    ngram, eagle = SpecInputType.NGRAM_VERIFY, SpecInputType.EAGLE_VERIFY
    adapter_.init_forward_metadata_out_graph(replayed([], eagle), in_capture=True)
    captured = dict(vars(adapter_))
    asked, outputs = [], []
    for requests, drafted in (([2, 0], eagle), ([1], ngram)):
        batch = replayed(requests, drafted)
        for part in (adapter_.token_to_kv_pool.keys, adapter_.token_to_kv_pool.values):
            part[:page] = torch.nan
        with NoSync():
            adapter_.init_forward_metadata_out_graph(batch)
        vars(adapter_).update(captured)  # what the graph reads
        real = [(r, test_verify.CACHED[r] + n) for r in requests for n in range(drafts)]
        q, k, v = of(real + [(0, 0)] * (4 * drafts - len(real)))
        padded = torch.zeros(4 * drafts, dtype=torch.int64)
        padded[: len(real)] = batch.out_cache_loc
        batch.out_cache_loc = padded
        if mla:
            parts = {"q_rope": q[..., latent:], "k_rope": k[..., latent:]}
            latents = k[..., :latent]
            partial = adapter_.forward_extend(
                q[..., :latent], latents, latents, layer, batch, **parts
            )
            out = comm.dcp_a2a_lse_reduce(
                lambda *_: None, *partial, group, is_lse_base_on_e=not adapter_.base2
            )
        else:
            mine = q[:, own * rank : own * (rank + 1)].flatten(1)
            out = adapter_.forward_extend(mine, k, v, layer, batch).view(len(q), own, latent)
        outputs.append(out[: len(real)])
        asked += requests
        # What stands in a row is what was written to it: padding went nowhere else.
        shard, pool = KVShard(group.world_size, rank), adapter_.token_to_kv_pool
        for request in requests:
            for position, slot in enumerate(slots.of[request]):
                if slot % shard.size == shard.rank:
                    kept = pool.get_key_buffer(0)[slot // shard.size]
                    assert torch.equal(kept, tokens.k[request, position]), (request, position)
    return asked, torch.cat(outputs)


def captured_drafts_error(backend: str, attention: Attention) -> float:
    """The norm of what is wrong, beside that of what is right."""
    prepare(backend, speculative_algorithm="NGRAM", speculative_num_draft_tokens=5)
    mla, page = attention == "MLA", (adapter(backend).pages or (4,))[0]
    widths = (288, 256) if backend == "triton" else (576, 512)  # as in NARROW
    heads = Heads(6, 1, *widths) if mla else Heads(6, 2, 16, 16)
    parents = test_verify.TREES["branches"]
    given = backend, heads, page, mla, parents
    found = run_threads(captured_drafts_on_rank, 3, *given, **parallel(3))
    tokens = steps.random_tokens(heads, 0, mla)
    wanted = torch.stack(
        [
            test_verify.expected(tokens, request, row.nonzero().flatten())
            for request in found[0][0]
            for row in test_verify.ancestry(parents)
        ]
    )
    got = torch.cat([outputs for _, outputs in found], dim=1).double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("backend", "attention"),
    [case for case in VERIFIED if case[1] in adapter(case[0]).drafts_in_graphs],
)
def test_captured_drafts_attend_their_ancestors_and_the_prefix(
    process: Fresh, backend: str, attention: Attention
) -> None:
    assert process.value(captured_drafts_error, backend, attention) < 1e-5


def test_the_matrix_says_what_runs_here() -> None:
    ran = {"extend": OWN, "graph": CAPTURED, "fp8": QUANTIZED, "verify": VERIFIED}
    for case in OWN:
        assert seen(*case, "CPU") == {feature for feature, cases in ran.items() if case in cases}
    assert all("verify" in seen(*case, "CPU") for case in VERIFIED)
