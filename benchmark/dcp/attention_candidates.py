"""Who attends in `benchmark.dcp attention`."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmark.dcp.attention_stage import Call, Heads, K, Problem, Stage

PLAIN = ("fa3", "flashinfer", "flashmla")  # peers that are timed without an adapter of theirs


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
    from sglang_helix.srt.layers.attention import kv_splits

    batch = stage.p.batch
    captured = batch if stage.p.device.type == "cuda" else 0
    stage.runner.decode_scratch = kv_splits.prepare(stage.runner, captured, batch)


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
    from sglang_helix.srt.layers.attention import kv_splits

    name = "GQA" if stage.p.heads.kv else "MLA"
    before = getattr(kv_splits, name)
    kernel = kv_splits.get_exec().kernel
    try:
        if choice.tuning is not None:
            setattr(kv_splits, name, choice.tuning)
        if choice.cap is None:
            return sharded(stage, "triton")
        # The flag of splits would take 8 for its default.
        tile = -(-stage.longest // (stage.ranks * choice.cap))
        with kernel.override(triton_attention_split_tile_size=tile):
            return sharded(stage, "triton")
    finally:
        setattr(kv_splits, name, before)


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
