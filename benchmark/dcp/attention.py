"""Decode attention over a shard of the cache, as the adapters call it, on one device.

    python -m benchmark.dcp attention                            the full run, on a GPU
    python -m benchmark.dcp attention --variants                 and the Triton adapter's choices
    TRITON_INTERPRET=1 python -m benchmark.dcp attention --quick --device cpu        anywhere

Anywhere, kernels that have stand-ins run on these where SGLANG_CPU_REFERENCE_STAND_INS names their
backends (docs/how-it-works.md).

For the heads that a rank attends with (H query on G key-value heads; MLA: H on one latent), a batch
of requests and their local tokens, each candidate takes one query token of every request to (out,
LSE) over tokens that lie scattered in a pool of SGLang's:

    NAME        the adapter of that backend, or SGLang's own class where it is complete upstream:
                K = 2, rank 0, with the metadata that a captured graph has
    NAME tp     what plain TP of that backend calls at the same local tokens: the bound of NAME
    copy        a device-to-device copy of as many bytes as the keys and values have

Candidates come from the table of adapters and run without a server: SGLang's classes are built on a
published configuration, a pool and a table of requests. Each layer of the pool is a set of buffers;
together they exceed the L2. Poisoned outputs are checked against fp32 before anything is timed; a
candidate that is wrong is left out and makes the exit status 1.
Neither the write of the new token nor the exchange is timed.

Rows go to the CSV and to stdout size by size; what is said on the way goes to stderr.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from sglang_helix.srt.layers.attention import measured

from benchmark.dcp import measure, report
from benchmark.dcp.kernels import device_name, relative_error, software

BOUND = {torch.bfloat16: 8e-3, torch.float32: 5e-6}
K = 2  # ranks of the group; an adapter reads local tokens, whatever their number


class Heads(NamedTuple):
    """H query heads on G key-value heads of width D.

    G = 0: MLA, on one latent of 512 elements and a rope of 64.
    """

    queries: int
    kv: int
    width: int = 128

    @property
    def attention(self) -> str:
        return "GQA" if self.kv else "MLA"

    @property
    def name(self) -> str:
        return f"{self.queries}/{self.kv}" if self.kv else f"MLA {self.queries}"

    @property
    def k_width(self) -> int:
        return self.width if self.kv else 576

    @property
    def v_width(self) -> int:
        return self.width if self.kv else 512

    @property
    def token_elements(self) -> int:
        """Elements of one token's keys and values."""
        return 2 * self.kv * self.width if self.kv else 576

    @property
    def scale(self) -> float:
        """Of the logits. MLA's is that of keys before they are absorbed: 128 and a rope of 64.

        FlashInfer's MLA takes it from the model's configuration, other backends from the layer.
        """
        return (self.width if self.kv else 192) ** -0.5


SHAPES = {
    heads.name: heads
    for heads in (
        *(Heads(64, 8), Heads(32, 4), Heads(16, 1), Heads(8, 1)),
        *(Heads(128, 0), Heads(16, 0)),
    )
}
QUICK = {heads.name: heads for heads in (Heads(4, 2, 16), Heads(4, 0))}
PLAIN = ("fa3", "flashinfer", "flashmla")  # peers that are timed without an adapter of theirs


def dtype_on(device: torch.device) -> torch.dtype:
    """The interpreter truncates what it casts to bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Problem:
    heads: Heads
    batch: int
    tokens: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return dtype_on(self.device)

    @property
    def moved(self) -> int:
        """Bytes of all keys and values."""
        return self.batch * self.tokens * self.heads.token_elements * self.dtype.itemsize


@dataclass(frozen=True)
class Size:
    """Heads by their name, requests, local tokens of each."""

    heads: str
    batch: int
    tokens: int


@dataclass(frozen=True)
class Row(report.Measured, Size):
    """One candidate at one size."""


# --- SGLang's objects without a server ------------------------------------------------------------


class Cache:
    """A pool whose layers hold random keys and values, a query a request, and the right outputs.

    The tokens of a request lie in random pages of 64, as on a server that has run for a while;
    within a page they are in order, which kernels for pages need.
    """

    PAGE = 64

    def __init__(self, p: Problem, layers: int) -> None:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

        self.p, heads = p, p.heads
        pages = -(-p.tokens // self.PAGE)
        common = (p.batch * pages * self.PAGE, self.PAGE, p.dtype)
        place = (layers, p.device.type, False)
        if heads.kv:
            self.pool: Any = MHATokenToKVPool(*common, heads.kv, heads.width, *place)
        else:
            self.pool = MLATokenToKVPool(*common, 512, 64, *place)
        random = torch.Generator(p.device).manual_seed(1)
        for number in range(layers):
            self.pool.get_key_buffer(number).normal_(generator=random)
            if heads.kv:
                self.pool.get_value_buffer(number).normal_(generator=random)
        order = 1 + torch.randperm(p.batch * pages, generator=torch.Generator().manual_seed(2))
        self.pages = order.view(p.batch, pages, 1)
        # Logits of a deviation of 1.5, large enough that the softmax is not flat.
        shape = p.batch, heads.queries, heads.k_width
        self.q = torch.randn(shape, generator=random, device=p.device)
        self.q = (self.q * (1.5 * heads.k_width**-0.5 / heads.scale)).to(p.dtype)
        self.want = [self._attended(number) for number in (0, layers - 1)]

    def slots(self, ranks: int) -> torch.Tensor:
        """[B, tokens * ranks] int32: of this rank's tokens and, between them, of the others'."""
        width = self.PAGE * ranks
        slots = (self.pages * width + torch.arange(width)).flatten(1)
        return slots[:, : self.p.tokens * ranks].to(self.p.device, torch.int32)

    def _attended(self, number: int) -> torch.Tensor:
        """[B, H, Dv] in fp32, one request at a time."""
        heads = self.p.heads
        keys, values = self.pool.get_key_buffer(number), self.pool.get_value_buffer(number)
        outs = []
        for query, rows in zip(self.q.float(), self.slots(1).long(), strict=True):
            k, v = keys[rows].float(), values[rows].float()
            grouped = query.view(k.shape[1], -1, heads.k_width)
            logits = torch.einsum("ghd,tgd->ght", grouped, k) * heads.scale
            outs.append(torch.einsum("ght,tgd->ghd", logits.softmax(-1), v).flatten(0, 1))
        return torch.stack(outs)


@functools.cache
def configured(heads: Heads, ranks: int, backend: str, longest: int, device: torch.device) -> Any:
    """A context of SGLang and its model's configuration, for one rank of `ranks`."""
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    with tempfile.TemporaryDirectory() as folder, ExitStack() as logs:
        # Warnings of servers, each time the same.
        logging.disable(logging.WARNING)
        logs.callback(logging.disable, logging.NOTSET)
        config = model_config(heads, longest * ranks, dtype_on(device))
        Path(folder, "config.json").write_text(json.dumps(config))
        args = ServerArgs(
            model_path=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            device=device.type,
            attention_backend=backend,
            tp_size=ranks,
            dcp_size=ranks,
        )
        context = runtime_context.create_context(args, role="scheduler")
        return context, args, ModelConfig.from_server_args(args)


class Stage:
    """A backend's surroundings: a configuration, a runner with the cache, a batch of one step."""

    def __init__(self, cache: Cache, ranks: int, backend: str, longest: int) -> None:
        self.cache, self.p, self.ranks, self.backend = cache, cache.p, ranks, backend
        self.context, self.args, self.config = configured(
            self.p.heads, ranks, backend, longest, self.p.device
        )
        self.longest = longest * ranks
        self.open = ExitStack()

    def __enter__(self) -> Stage:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        p, heads, pool = self.p, self.p.heads, self.cache.pool
        self.open.enter_context(self.published())
        page = pool.page_size
        allocator = SimpleNamespace(page_size=page, get_kvcache=lambda: pool, device=p.device)
        table = torch.zeros((p.batch, self.longest), dtype=torch.int32, device=p.device)
        slots = self.cache.slots(self.ranks)
        table[:, : slots.shape[1]] = slots
        requests = SimpleNamespace(size=p.batch, req_to_token=table)
        self.layers = [
            RadixAttention(
                heads.queries,
                heads.k_width,
                heads.scale,
                num_kv_heads=heads.kv or 1,
                layer_id=number,
                v_head_dim=heads.v_width,
            )
            for number in range(pool.layer_num)
        ]
        self.runner = SimpleNamespace(
            model=torch.nn.ModuleList(self.layers),
            model_config=self.config,
            device=p.device.type,
            gpu_id=0,
            use_mla_backend=not heads.kv,
            page_size=page,
            is_draft_worker=False,
            sliding_window_size=None,
            attention_chunk_size=None,
            init_new_workspace=False,
            req_to_token_pool=requests,
            token_to_kv_pool=pool,
            token_to_kv_pool_allocator=allocator,
            decode_num_tokens_per_req=lambda: 1,
            spec_algorithm=SimpleNamespace(
                is_none=lambda: True, is_dspark=lambda: False, is_frozen_kv_mtp=lambda: False
            ),
            server_args=self.args,
            pre_model_load_memory=0.0,  # the pool is there already
            kv_cache_dtype=p.dtype,
            kv_cache_dtype_str="auto",
            dtype=p.dtype,
            prefill_attention_backend_str=self.backend,
            decode_attention_backend_str=self.backend,
            kv_index_translator=KVIndexTranslator(
                req_to_token=table,
                token_to_kv_pool_allocator=allocator,
                token_to_kv_pool=pool,
                page_size=page,
                device=p.device.type,
            ),
        )
        length = p.tokens * self.ranks
        lens = torch.full((p.batch,), length, dtype=torch.int64)
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=p.batch,
            seq_lens=lens.to(p.device),
            seq_lens_cpu=lens,
            seq_lens_sum=p.batch * length,
            req_pool_indices=torch.arange(p.batch, device=p.device),
            out_cache_loc=torch.zeros(p.batch, dtype=torch.int64, device=p.device),
            out_cache_loc_is_physical=False,
            positions=lens.to(p.device) - 1,
            input_ids=torch.zeros(p.batch, dtype=torch.int64, device=p.device),
            encoder_lens=None,
            spec_info=None,
            kv_loc_plan=None,
            attn_dcp_metadata=None,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.open.close()

    @contextmanager
    def published(self) -> Iterator[None]:
        """The configuration is SGLang's, its rank 0 this process, and the pool's pages its own."""
        from sglang.srt import runtime_context
        from sglang_helix.srt.layers.dcp.exchange import Exchanger

        group = SimpleNamespace(world_size=self.ranks, rank_in_group=0, unique_name="benchmark")
        group.exchanger = Exchanger("a2a", group)
        with (
            runtime_context.use_context(self.context),
            runtime_context.get_parallel().override(
                tp_rank=0,
                attn_tp_rank=0,
                dcp_rank=0,
                attn_dcp_rank=0,
                dcp_group=group,
                dcp_comm_backend="a2a",
            ),
        ):
            self.cache.pool.page_size = runtime_context.get_schedule().page_size or 1
            yield

    def call(self, call: Call, number: int) -> torch.Tensor:
        """What the call returns; where nothing is captured it runs when other stages are open."""
        with self.published():
            return call(number)

    def prepared(self, backend: Any) -> Any:
        """The backend with this batch's metadata: of a captured graph, or on a CPU of eager."""
        if self.p.device.type == "cuda":
            backend.init_cuda_graph_state(self.p.batch, self.p.batch)
            backend.init_forward_metadata_out_graph(self.batch, in_capture=True)
            backend.init_forward_metadata_out_graph(self.batch)
        else:
            backend.init_forward_metadata(self.batch)
        return backend


def model_config(heads: Heads, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json of one layer whose attention has these heads."""
    common = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": heads.queries,
        "vocab_size": 128,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if heads.attention == "GQA":
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": heads.kv,
            "head_dim": heads.width,
        }
    lite = Path(__file__).parent / "models/DeepSeek-V2-Lite/config.json"
    ours = {
        "num_key_value_heads": heads.queries,
        "rope_scaling": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return json.loads(lite.read_text()) | common | ours


# --- candidates -----------------------------------------------------------------------------------

# Attends the cache's queries in one of its layers: out [B, H, Dv].
Call = Callable[[int], torch.Tensor]


def sharded(stage: Stage, name: str) -> Call:
    """What an adapter's decode does between the store and the exchange."""
    from sglang_helix.srt.layers.attention.adapters import adapter
    from sglang_helix.srt.layers.attention.sharded import ShardedAttention
    from sglang_helix.srt.layers.dcp.lse_combine import combine_splits
    from sglang_helix.srt.layers.dcp.partial import Splits

    attention: Any = stage.p.heads.attention
    if name == "triton":
        prepare_triton(stage)
    backend = stage.prepared(
        pkgutil.resolve_name(adapter(name).classes(attention)[0])(stage.runner)
    )
    q = stage.cache.q
    if not isinstance(backend, ShardedAttention):
        return lambda number: mla_decode(stage, backend, number)[0].view(len(q), -1, 512)
    # Joined or split before the clock runs: for plain TP the model does as much.
    queries = (
        q if stage.p.heads.kv else backend.mla_queries(*q.split([512, 64], -1), stage.layers[0])
    )

    def call(number: int) -> torch.Tensor:
        partial = backend.partial_decode(queries, stage.layers[number], stage.batch)
        return combine_splits(partial, q.dtype)[0] if isinstance(partial, Splits) else partial[0]

    return call


def plain(stage: Stage, name: str) -> Call:
    """What plain TP of a backend calls, by SGLang's own factory."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    backend = stage.prepared(ATTENTION_BACKENDS[name](stage.runner))
    q, heads = stage.cache.q, stage.p.heads

    def call(number: int) -> torch.Tensor:
        if heads.kv:
            # Neither keys nor values are read: the tokens are in the pool.
            out = backend.forward_decode(
                *(q.flatten(1), q[:, : heads.kv], q[:, : heads.kv]),
                stage.layers[number],
                stage.batch,
                save_kv_cache=False,
            )
        else:
            out = mla_decode(stage, backend, number)
        return out.view(len(q), heads.queries, -1)

    return call


def mla_decode(stage: Stage, backend: Any, number: int) -> Any:
    """Absorbed decode by a class of SGLang's; queries come in two parts, or in one, as it takes."""
    from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS

    q = stage.cache.q
    where = stage.layers[number], stage.batch
    latent = q[:, :1, :512]  # of the new token, which is in the pool
    if stage.backend in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        parts = {"q_rope": q[..., 512:], "k_rope": q[:, :1, 512:]}
        return backend.forward_decode(
            q[..., :512], latent, latent, *where, save_kv_cache=False, **parts
        )
    return backend.forward_decode(q.flatten(1), latent, latent, *where, save_kv_cache=False)


def prepare_triton(stage: Stage) -> None:
    """As between a model and its pool, see `model_executor.model_runner.prepare_decode`."""
    from sglang_helix.srt.layers.attention import triton_backend

    batch = stage.p.batch
    captured = batch if stage.p.device.type == "cuda" else 0
    stage.runner.decode_scratch = triton_backend.prepare(stage.runner, captured, batch)


class Variant(NamedTuple):
    """A choice of the Triton adapter: a tuning, or a cap on splits."""

    name: str
    tuning: Any = None
    cap: int | None = None


def variants(heads: Heads) -> Iterator[Variant]:
    """The choices beside the adapter's own, one step each from it."""
    from sglang_helix.srt.layers.attention.kv_splits import GQA, MLA

    own = GQA if heads.kv else MLA
    yield Variant("triton, 8 splits", cap=8)  # as SGLang caps them for GQA
    yield Variant("triton, 64 splits", cap=64)
    for programs in (2, 4, 8, 16, 32):
        if programs != own.programs_per_sm:
            yield Variant(f"triton, {programs} per SM", own._replace(programs_per_sm=programs))
    for least in (32, 64, 128, 256):
        if least != own.least_tokens:
            yield Variant(f"triton, {least} tokens", own._replace(least_tokens=least))
    tiles: tuple[dict[str, int], ...] = ({"stages": 3}, {"tokens": 64}, {"tokens": 64, "stages": 3})
    if not heads.kv:
        tiles = ({"stages": 3}, {"warps": 8})
        if heads.queries >= 64:
            tiles += ({"heads": 64, "warps": 8},)
    for tile in tiles:
        said = " ".join(f"{name} {value}" for name, value in tile.items())
        yield Variant(f"triton, tile {said}", own._replace(tile=own.tile._replace(**tile)))


def variant(stage: Stage, choice: Variant) -> Call:
    """The Triton adapter with another choice."""
    from sglang_helix.srt.layers.attention import triton_backend

    name = "GQA" if stage.p.heads.kv else "MLA"
    before = getattr(triton_backend, name)
    kernel = triton_backend.get_exec().kernel
    try:
        if choice.tuning is not None:
            setattr(triton_backend, name, choice.tuning)
        if choice.cap is None:
            return sharded(stage, "triton")
        # The flag of splits would take 8 for its default.
        tile = -(-stage.longest // (stage.ranks * choice.cap))
        with kernel.override(triton_attention_split_tile_size=tile):
            return sharded(stage, "triton")
    finally:
        setattr(triton_backend, name, before)


class Candidate(NamedTuple):
    name: str
    ranks: int
    backend: str
    build: Callable[[Stage], Call]


def candidates(p: Problem, with_variants: bool) -> Iterator[Candidate]:
    from sglang.srt.runtime_context import get_platform
    from sglang_helix.srt.layers.attention.adapters import serving

    cuda = p.device.type == "cuda"
    attention: Any = p.heads.attention
    # The plain torch reference takes no time that says anything, and on a CPU only Triton's kernels
    # run, in its interpreter, and those that have stand-ins.
    names = [
        record.name
        for record in serving(attention)
        if not record.off_cuda
        and record.runs_on(get_platform(), attention)
        and (cuda or record.name in ("triton", *stand_ins()))
    ]
    for name in names:
        yield Candidate(name, K, name, partial(sharded, name=name))
    for name in dict.fromkeys([*names, *PLAIN] if cuda else names):
        if attention == "MLA" or name != "flashmla":
            yield Candidate(f"{name} tp", 1, name, partial(plain, name=name))
    if with_variants:
        for choice in variants(p.heads):
            yield Candidate(choice.name, K, "triton", partial(variant, choice=choice))


def stand_ins() -> list[str]:
    """Backends whose kernels shall be stand-ins on a CPU."""
    return list(filter(None, os.environ.get("SGLANG_CPU_REFERENCE_STAND_INS", "").split(",")))


# --- running --------------------------------------------------------------------------------------


class Bench:
    """Problems one after the other, and what is remembered between them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.samples, self.variants, self.quick = options.samples, options.variants, options.quick
        self.longest = max(options.tokens)
        self.launches: dict[tuple[str, str], int | None] = {}
        # Whether an adapter of the series was not measured, or any candidate was wrong.
        self.failed = False
        self.refused: dict[tuple[str, str], str] = {}

    def measure(self, p: Problem) -> list[Row]:
        layers = 1 if self.quick else measure.sets_to_rotate(p.device, p.moved)
        cache = Cache(p, layers)
        rotations: dict[str, measure.Rotation] = {}
        errors: dict[str, float] = {}
        for candidate in candidates(p, self.variants):
            key = p.heads.name, candidate.name
            if key in self.refused:
                continue
            try:
                with Stage(cache, candidate.ranks, candidate.backend, self.longest) as stage:
                    call = candidate.build(stage)
                    calls = [partial(stage.call, call, number) for number in range(layers)]
                    rotation = measure.Rotation(calls, p.device)
                    got = [out.clone() for out in rotation.checked_outputs()]
                    if key not in self.launches:
                        self.launches[key] = measure.launches(calls[0])
            except Exception as failure:
                # A peer that is not installed, or does not take this shape, is no failure of ours.
                self.failed |= candidate.name in {record.name for record in ours()}
                reason = (str(failure).strip().splitlines() or [""])[0][:200]
                self.refused[key] = f"{type(failure).__name__}: {reason}"
                say(f"not measured: {candidate.name} of {key[0]} ({self.refused[key]})")
                continue
            error = max(map(relative_error, got, cache.want))
            if not error <= BOUND[p.dtype]:
                self.failed = True
                say(f"WRONG: {candidate.name} at {p}: relative error {error:.3g}; not timed")
                continue
            rotations[candidate.name], errors[candidate.name] = rotation, error
        source = torch.empty((layers, 2, p.moved // 2), dtype=torch.uint8, device=p.device)
        rotations[report.COPY] = measure.Rotation(
            [partial(target.copy_, whence) for whence, target in source], p.device
        )
        timings = measure.take_turns(rotations, self.samples)
        return [
            Row(
                heads=p.heads.name,
                batch=p.batch,
                tokens=p.tokens,
                name=name,
                launches=self.launches.get((p.heads.name, name)),
                p10_us=timing.p10,
                median_us=timing.median,
                p90_us=timing.p90,
                moved_bytes=p.moved,
                copy_share=timings[report.COPY].median / timing.median,
                error=errors.get(name),
                rotated_mib=layers * p.moved / 2**20,
                device=device_name(p.device),
                software=software(),
            )
            for name, timing in timings.items()
        ]


def ours() -> tuple[Any, ...]:
    from sglang_helix.srt.layers.attention.adapters import ADAPTERS

    return tuple(record for record in ADAPTERS if record.own_file)


def say(line: str) -> None:
    """What is not a figure."""
    print(line, file=sys.stderr, flush=True)


def by_size(rows: list[Row]) -> dict[tuple[str, int, int], dict[str, Row]]:
    """Per size the candidates by their names."""
    sizes: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        sizes.setdefault((row.heads, row.batch, row.tokens), {})[row.name] = row
    return sizes


class Table:
    """A line a size, a column a candidate: microseconds, and the share of the copy's bandwidth.

    A head stands above the first line and wherever there are other candidates.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def print(self, rows: list[Row]) -> None:
        for (heads, batch, tokens), found in by_size(rows).items():
            if not found.keys() <= set(self.names):
                self.names = list(found)
                self._print("heads", "B", "tokens", self.names)
            cells = [
                f"{row.median_us:.1f} ({row.copy_share:.0%})" if row else "-"
                for row in map(found.get, self.names)
            ]
            self._print(heads, batch, tokens, cells)

    def _print(self, heads: str, batch: object, tokens: object, cells: list[str]) -> None:
        width = max(14, *(len(name) + 2 for name in self.names))
        line = f"{heads:<9}{batch:>4}{tokens:>8}" + "".join(f"{cell:>{width}}" for cell in cells)
        print(line, flush=True)


def summary(rows: list[Row]) -> str:
    """Per adapter: its time over that of its backend's plain TP, and over the fastest plain one."""
    sizes, lines = by_size(rows), []
    for name in dict.fromkeys(row.name for row in rows):
        for what, others in (
            ("its backend's plain TP", [f"{name} tp"]),
            ("the fastest plain TP", [row.name for row in rows if row.name.endswith(" tp")]),
        ):
            ratios = [
                (found[name].median_us / min(found[o].median_us for o in others if o in found), at)
                for at, found in sizes.items()
                if name in found and any(other in found for other in others)
            ]
            if ratios and not name.endswith(" tp") and name != report.COPY:
                (low, _), (high, at) = min(ratios), max(ratios)
                lines.append(f"{name} over {what}: {low:.2f} to {high:.2f} {list(at)}")
    return "\n".join(lines)


def ship(rows: list[Row], major: int, path: Path = measured.FILE) -> None:
    """Write the adapters' times where servers read them; heads without figures keep theirs."""
    figures = json.loads(path.read_text()) if path.exists() else {}
    names = {record.name for record in ours()}
    for heads in dict.fromkeys(row.heads for row in rows):
        us: dict[str, dict[str, float]] = {}
        for row in rows:
            if row.heads == heads and row.name in names:
                size = f"{row.batch} x {row.tokens}"
                us.setdefault(row.name, {})[size] = float(f"{row.median_us:.4g}")
        figures[heads] = measured.Figures(device=rows[0].device, major=major, us=us)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def plot(rows: list[Row], path: Path) -> str:
    """Share of the copy's bandwidth against local tokens, a panel for each heads and batch."""
    plots = report.pyplot()
    if plots is None:
        return report.no_plot("attention", path)
    shapes = list(dict.fromkeys(row.heads for row in rows))
    batches = list(dict.fromkeys(row.batch for row in rows))
    names = [name for name in dict.fromkeys(row.name for row in rows) if name != report.COPY]
    figure, axes = plots.subplots(
        *(len(shapes), len(batches)),
        figsize=(4 * len(batches), 3 * len(shapes)),
        squeeze=False,
        layout="constrained",
    )
    colours = plots.get_cmap("tab20")
    for heads, line in zip(shapes, axes, strict=True):
        for batch, axis in zip(batches, line, strict=True):
            for name in names:
                points = sorted(
                    (row.tokens, 100 * row.copy_share)
                    for row in rows
                    if (row.heads, row.batch, row.name) == (heads, batch, name)
                )
                if points:
                    style = "--" if name.endswith(" tp") else "-"
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        marker="o",
                        markersize=3,
                        color=colours(names.index(name) % 20),
                        label=name,
                    )
            axis.axhline(100, color="grey", linewidth=0.8)
            axis.set(xscale="log", title=f"{heads}, batch {batch}", xlabel="local tokens")
            axis.set_ylabel("% of the copy's bandwidth")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=6)
    figure.suptitle(f"{rows[0].device}, {rows[0].software}; solid: sharded, dashed: plain TP")
    return report.save(figure, path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.dcp attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="H/G")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], metavar="B")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 32768, 131072], help="local ones"
    )
    parser.add_argument("--variants", action="store_true", help="the Triton adapter's choices too")
    parser.add_argument("--quick", action="store_true", help="few and small sizes, in seconds")
    parser.add_argument("--samples", type=int, default=10, help="per candidate and turn, 2 turns")
    parser.add_argument("--csv", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a PNG here; needs matplotlib")
    parser.add_argument(
        "--ship",
        type=int,
        metavar="MAJOR",
        help="of the GPU's compute capability: write the adapters' times where servers read them",
    )
    parser.add_argument(
        "--from-csv", nargs="+", type=Path, help="measure nothing, report on these figures together"
    )
    options = parser.parse_args(argv)
    shapes = SHAPES if not options.quick else QUICK
    if options.quick:
        options.batch, options.tokens, options.samples = [2], [33], 2
    if options.quick and options.ship:
        parser.error("--ship: the figures of --quick are no server's")
    if options.samples < 2:
        parser.error(f"--samples {options.samples}: at least 2 are needed for percentiles")
    for size in (*options.batch, *options.tokens):
        if size < 1:
            parser.error(f"--batch and --tokens must be positive, got {size}")
    if options.from_csv:
        rows, failed = [row for path in options.from_csv for row in report.read_csv(path, Row)], 0
        Table().print(rows)
        if options.csv:
            report.write_csv(rows, options.csv, Row)
    else:
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("no CUDA device: use TRITON_INTERPRET=1, --device cpu and --quick")
        chosen = list(shapes) if options.quick else options.shape or list(shapes)
        rows, failed = run(options, [shapes[name] for name in chosen])
    print(summary(rows))
    if options.csv:
        print(f"figures: {options.csv}")
    if options.plot:
        print(plot(rows, options.plot))
    if options.ship:
        ship(rows, options.ship)
        print(f"servers read: {measured.FILE}")
    return int(failed)


def run(options: argparse.Namespace, shapes: list[Heads]) -> tuple[list[Row], bool]:
    """All figures, and whether an adapter was not measured or a candidate was wrong.

    The figures of a size are in the table and in the CSV before the next size begins.
    """
    device = torch.device(options.device)
    torch.set_grad_enabled(False)
    if device.type == "cpu" and stand_ins():
        from sglang_cpu_reference import stand_ins as kernels

        kernels.install()
    print(f"{device_name(device)}, {software()}", flush=True)
    bench, lines, rows = Bench(options), Table(), []
    if options.csv:
        report.write_csv([], options.csv, Row)
    for heads in shapes:
        for batch in options.batch:
            for tokens in options.tokens:
                started = time.monotonic()
                found = bench.measure(Problem(heads, batch, tokens, device))
                spent = time.monotonic() - started
                lines.print(found)
                if options.csv:
                    report.write_csv(found, options.csv, Row, append=True)
                rows += found
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # of graphs that are gone
                say(f"{heads.name} B={batch} tokens={tokens}: {spent:.1f} s")
    return rows, bench.failed
