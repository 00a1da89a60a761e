"""Decode and extend over a cache sharded on K ranks, and unsharded attention in float64.

The ranks are threads with the torch reference as their backend. Every step writes what it brings
and reads what earlier steps wrote, so a token in a wrong row, a foreign row or a row that was never
written (NaN) shows in the result; ranks that do not take the same collectives show as a deadlock.
"""

import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from sglang.srt.layers.dcp import comm as upstream_comm
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_helix.srt.layers.attention import sharded
from sglang_helix.srt.layers.attention.torch_native_backend import ShardedTorchReferenceAttnBackend
from sglang_helix.srt.layers.dcp import comm, planner
from sglang_helix.srt.layers.dcp.ownership import KVShard
from srt.slots import Slots
from srt.threads import ThreadGroup, get_parallel

RELATIVE_ERROR = 2e-6


class Step(NamedTuple):
    """One forward pass: which requests bring how many tokens; decode brings one each."""

    mode: str
    tokens: dict[int, int]


# Chunks that end anywhere, prefixes shorter than K, one request and two; a prefix before, behind
# and on both sides of none.
STEPS = [
    Step("extend", {0: 1}),
    Step("decode", {0: 1}),
    Step("extend", {0: 5, 1: 2}),
    Step("decode", {1: 1}),
    Step("extend", {2: 3}),
    Step("extend", {3: 40, 2: 1}),
    Step("decode", {0: 1, 1: 1}),
    Step("extend", {1: 33}),
    Step("decode", {0: 1, 1: 1, 2: 1, 3: 1}),
    Step("extend", {3: 1, 0: 1}),
    Step("decode", {3: 1}),
    Step("extend", {1: 3, 4: 2, 0: 1}),
]
REQUESTS = 5


class Heads(NamedTuple):
    """Query and key-value heads of a KVP group, and their widths."""

    queries: int
    kv: int
    k_width: int
    v_width: int


class Pool:
    """A rank's rows, NaN until written; the store of MHATokenToKVPool or of MLATokenToKVPool."""

    def __init__(self, rows: int, shard: KVShard, heads: Heads) -> None:
        self.shard = shard
        self.keys = torch.full((rows, heads.kv, heads.k_width), float("nan"))
        self.values = torch.full((rows, heads.kv, heads.v_width), float("nan"))

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def set_kv_buffer(
        self, layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor, *scales: None
    ) -> None:
        self.keys[where.loc], self.values[where.loc] = k, v


class LatentPool(Pool):
    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys[..., : self.values.shape[-1]]

    def set_mla_kv_buffer(
        self, layer: Any, where: Any, latent: torch.Tensor, rope: torch.Tensor
    ) -> None:
        own = where.loc % self.shard.size == self.shard.rank
        self.keys[where.loc[own] // self.shard.size] = torch.cat([latent, rope], -1)[own]

    def get_mla_kv_buffer(self, layer: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        latent = self.values.shape[-1]
        return self.keys[rows][..., :latent], self.keys[rows][..., latent:]


@pytest.fixture(autouse=True)
def _ranks_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sharded, planner, upstream_comm):
        monkeypatch.setattr(module, "get_parallel", get_parallel)
    monkeypatch.setattr(planner, "get_attn_backend", lambda: TRANSLATING)


# In the place of a backend: how slots become rows.
TRANSLATING = SimpleNamespace(
    kv_index_translator=SimpleNamespace(
        translate_dcp_read_ids=lambda slots: slots // get_parallel().attn_dcp_size
    )
)


def model_of(heads: Heads, window: int) -> torch.nn.Module:
    """Of one layer, as far as a backend looks at it."""
    layer = RadixAttention(
        *(heads.queries, heads.k_width, 1.0),
        num_kv_heads=heads.kv,
        layer_id=0,
        v_head_dim=heads.v_width,
        sliding_window_size=window - 1,
    )
    return torch.nn.ModuleList([layer])


def backend_of(
    rank: int, group: ThreadGroup, heads: Heads, slots: Slots, mla: bool, window: int = 0
) -> Any:
    pool = (LatentPool if mla else Pool)(slots.rows, KVShard(group.world_size, rank), heads)
    runner = SimpleNamespace(
        device="cpu",
        is_draft_worker=False,
        page_size=slots.page // group.world_size,
        use_mla_backend=mla,
        req_to_token_pool=SimpleNamespace(req_to_token=None),
        token_to_kv_pool=pool,
        model_config=SimpleNamespace(
            get_max_num_attention_heads=lambda: heads.queries, hf_text_config=None
        ),
        model=model_of(heads, window),
    )
    return ShardedTorchReferenceAttnBackend(runner)


def layer_of(queries: int, kv: int, heads: Heads, window: int = 0) -> Any:
    return SimpleNamespace(
        tp_q_head_num=queries,
        tp_k_head_num=kv,
        qk_head_dim=heads.k_width,
        v_head_dim=heads.v_width,
        scaling=heads.k_width**-0.5,
        logit_cap=0.0,
        logit_capping_method="tanh",
        layer_id=0,
        head_dim=heads.k_width,
        tp_v_head_num=kv,
        k_scale=None,
        v_scale=None,
        k_scale_float=None,
        v_scale_float=None,
        is_cross_attention=False,
        attn_type=AttentionType.DECODER,
        sliding_window_size=window - 1,
        xai_temperature_len=-1,
    )


class Tokens(NamedTuple):
    """Every token of every request: q [request, token, head, width], k, v."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def random_tokens(heads: Heads, seed: int, mla: bool) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    longest = max(sum(step.tokens.get(request, 0) for step in STEPS) for request in range(REQUESTS))

    def made(count: int, width: int) -> torch.Tensor:
        return 1.7 * torch.randn(REQUESTS, longest, count, width, generator=generator)

    k = made(heads.kv, heads.k_width)
    v = k[..., : heads.v_width] if mla else made(heads.kv, heads.v_width)
    return Tokens(made(heads.queries, heads.k_width), k, v)


def sinks_of(heads: Heads) -> torch.Tensor:
    """A sink of each query head, from one that changes little to one that decides: [H]."""
    return torch.linspace(-2, 4, heads.queries)


def exact(
    tokens: Tokens,
    request: int,
    position: int,
    sinks: torch.Tensor | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Attention of one token over itself and all before it, one head at a time: [H, Dv].

    Of so many tokens at most, where there is a window.
    """
    first = max(position + 1 - window, 0) if window else 0
    q, k, v = (part[request].double() for part in tokens)
    k, v, position, q = k[first:], v[first:], position - first, q[first:]
    group = q.shape[1] // k.shape[1]
    rows = []
    for head in range(q.shape[1]):
        keys = k[: position + 1, head // group]
        logits = keys @ q[position, head] * q.shape[-1] ** -0.5
        if sinks is not None:
            logits = torch.cat([logits, sinks[head : head + 1].double()])
        weights = torch.softmax(logits, 0)[: position + 1]
        rows.append(weights @ v[: position + 1, head // group])
    return torch.stack(rows)


def forward_batch(step: Step, slots: Slots) -> tuple[Any, list[tuple[int, int]]]:
    """SGLang's description of the step's batch, and its (request, position)s in order."""
    prefixes = {request: len(slots.of.get(request, [])) for request in step.tokens}
    new = {request: slots.extend(request, count) for request, count in step.tokens.items()}
    lens = [prefixes[request] + count for request, count in step.tokens.items()]
    batch = SimpleNamespace(
        out_cache_loc=torch.tensor(list(itertools.chain(*new.values()))),
        out_cache_loc_is_physical=False,
        seq_lens=torch.tensor(lens),
        req_pool_indices=torch.tensor(list(step.tokens)),
        forward_mode=ForwardMode.EXTEND,
        extend_prefix_lens_cpu=list(prefixes.values()),
        extend_seq_lens_cpu=list(step.tokens.values()),
        spec_info=None,
        attn_dcp_metadata=None,
        batch_size=len(lens),
        seq_lens_cpu=torch.tensor(lens),
        seq_lens_sum=sum(lens),
        extend_prefix_lens=torch.tensor(list(prefixes.values())),
        extend_seq_lens=torch.tensor(list(step.tokens.values())),
        kv_loc_plan=None,
        encoder_lens=None,
        attn_attend_prefix_cache=None,
        positions=torch.arange(sum(step.tokens.values())),
    )
    if step.mode == "decode":
        batch.forward_mode = ForwardMode.DECODE
    order = [(r, prefixes[r] + n) for r, count in step.tokens.items() for n in range(count)]
    return batch, order


def gqa_on_rank(
    rank: int,
    group: ThreadGroup,
    heads: Heads,
    page: int,
    replicated: bool,
    sinks: bool = False,
    window: int = 0,
) -> list[torch.Tensor]:
    """Output of every step, [T, own heads, Dv]."""
    tokens = random_tokens(heads, 0, mla=False)
    slots = Slots(group.world_size, page, pages=300)
    backend = backend_of(rank, group, heads, slots, mla=False, window=window)
    own = heads.queries // group.world_size
    brought = slice(None) if replicated else slice(own * rank, own * (rank + 1))
    layer = layer_of(heads.queries if replicated else own, heads.kv, heads, window)
    extra = {"sinks": sinks_of(heads)[brought]} if sinks else {}
    outputs = []
    for step in STEPS:
        batch, order = forward_batch(step, slots)
        backend.req_to_token_pool.req_to_token = slots.table()
        q, k, v = (torch.stack([part[r, t] for r, t in order]) for part in tokens)
        backend.init_forward_metadata(batch)
        run = backend.forward_decode if step.mode == "decode" else backend.forward_extend
        out = run(q[:, brought].flatten(1), k, v, layer, batch, **extra)
        outputs.append(out.view(len(order), own, heads.v_width))
    return outputs


def plan(batch: Any, slots: Slots, pool: LatentPool) -> Any:
    prefixes, chunks = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
    return planner.prepare_decode_context_parallel_metadata(
        batch.seq_lens,
        torch.tensor(prefixes),
        prefixes,
        torch.tensor(chunks),
        batch.req_pool_indices,
        slots.table(),
        int(batch.seq_lens.sum()),
        pool.keys.shape,
        torch.float32,
        "cpu",
        lambda *_: None,
    )


def mla_on_rank(
    rank: int, group: ThreadGroup, heads: Heads, page: int, exchange: str
) -> list[torch.Tensor | None]:
    """Output of every step, [T, own heads, latent], as SGLang's forward_mla gets it, if it does."""
    tokens = random_tokens(heads, 1, mla=True)
    slots = Slots(group.world_size, page, pages=300)
    backend = backend_of(rank, group, heads, slots, mla=True)
    own, latent = heads.queries // group.world_size, heads.v_width
    mine = slice(own * rank, own * (rank + 1))
    outputs: list[torch.Tensor | None] = []
    for step in STEPS:
        batch, order = forward_batch(step, slots)
        backend.req_to_token_pool.req_to_token = slots.table()
        q, k, _ = (torch.stack([part[r, t] for r, t in order]) for part in tokens)
        compressed, rope = k[..., :latent], k[..., latent:]
        if step.mode == "extend":
            batch.attn_dcp_metadata = plan(batch, slots, backend.token_to_kv_pool)
        backend.init_forward_metadata(batch)
        if step.mode == "decode":
            out, lse = backend.forward_decode(
                q[..., :latent],
                compressed,
                compressed,
                layer_of(heads.queries, 1, heads),
                batch,
                q_rope=q[..., latent:],
                k_rope=rope,
            )
            if exchange == "a2a":
                merged = comm.dcp_a2a_lse_reduce(lambda *_: None, out, lse, group)
            else:
                merged = comm.cp_lse_ag_out_rs_mla(
                    out, lse, group, is_lse_base_on_e=True
                ).transpose(0, 1)
        else:
            upstream_comm.all_gather_kv_cache_for_mla_extend(
                backend.token_to_kv_pool,
                None,
                batch.extend_prefix_lens_cpu,
                batch.attn_dcp_metadata.dcp_local_prefix_kv_indices,
                batch.attn_dcp_metadata.dcp_extend_prefix_lens_sum,
                batch.attn_dcp_metadata.dcp_kv_buffer,
                latent,
                compressed,
                rope,
            )
            if backend.upstream_prefill and not any(batch.extend_prefix_lens_cpu):
                # SGLang attends such a chunk with keys and values of its own.
                backend._store_mla(layer_of(own, 1, heads), batch, compressed, rope)
                outputs.append(None)
                continue
            merged = backend.forward_extend(
                q[:, mine, :latent].flatten(1),
                compressed,
                compressed,
                layer_of(own, 1, heads),
                batch,
                q_rope=q[:, mine, latent:],
                k_rope=rope,
            ).view(len(order), own, latent)
        outputs.append(merged)
    return outputs


def check(
    outputs: list[list[torch.Tensor | None]],
    tokens: Tokens,
    sinks: torch.Tensor | None = None,
    window: int = 0,
) -> None:
    """Every rank's own heads, step by step."""
    lengths = dict.fromkeys(range(REQUESTS), 0)
    ranks = len(outputs)
    for number, step in enumerate(STEPS):
        rows = []
        for request, count in step.tokens.items():
            first = lengths[request]
            rows += [exact(tokens, request, first + n, sinks, window) for n in range(count)]
            lengths[request] += count
        wanted = torch.stack(rows).chunk(ranks, dim=1)
        for rank in range(ranks):
            if (found := outputs[rank][number]) is None:
                continue
            got = found.double()
            error = (got - wanted[rank]).norm() / wanted[rank].norm()
            assert error < RELATIVE_ERROR, f"step {number} {step}, rank {rank}: {error:.1e}"
