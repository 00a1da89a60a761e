"""Seam 4, exchange: partial attention of a KVP group's heads -> each rank's own heads, exact.

Every rank of the group brings out [B, H, D] and lse [B, H] (fp32) of the same B queries and H
heads, computed over its own tokens. Rank j ends with out [B, H/K, D] and lse [B, H/K] of heads
[j * H/K, (j + 1) * H/K) over all tokens:

    lse = log sum_n exp(lse_n),    out = sum_n exp(lse_n - lse) out_n

(the softmax identity behind flash decoding). A rank without tokens brings lse = -inf; what stands
in its out is never used. An attention sink is a key of this logit and value 0 that every query of
its head sees: partial results leave it out, and the exchange adds those of the rank's own heads
(sinks [H/K], natural logarithm) once, in fp32, as one more column of the merge.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_helix.srt.layers.dcp.lse_combine import combine, pack, rescale, unpack
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

if TYPE_CHECKING:
    from sglang_helix.srt.layers.dcp.symm_workspace import SymmExchange

logger = logging.getLogger(__name__)

# GroupCoordinator of the KVP group; SGLang is untyped.
Group = Any


class Exchange(Protocol):
    """One implementation per communication backend; `group` is a GroupCoordinator."""

    def __call__(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        group: Group,
        *,
        base2: bool = False,
        sinks: torch.Tensor | None = None,
        head_major: bool = False,
    ) -> Partial:
        """(out [B, H, D], lse [B, H]) -> (out [B, H/K, D] in out's dtype, lse [B, H/K]).

        head_major: lay the output out as [H/K, B, D], where that costs nothing.
        """


def a2a(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Group,
    *,
    base2: bool = False,
    sinks: torch.Tensor | None = None,
    head_major: bool = False,
) -> Partial:
    """One all-to-all of packed rows (output and LSE together), then a local combine."""
    send = pack(out, lse, group.world_size)
    received = torch.empty_like(send)
    group.all_to_all_single(received, send)
    partials, lses = unpack(received, out.shape[-1], out.dtype)
    return combine(partials, lses, base2=base2, sinks=sinks, return_lse=True)


def ag_rs(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Group,
    *,
    base2: bool = False,
    sinks: torch.Tensor | None = None,
    head_major: bool = False,
) -> Partial:
    """All-gather of the LSEs, then a reduce-scatter of the rescaled outputs in fp32."""
    lses = lse.new_empty(group.world_size, *lse.shape)
    group.all_gather_into_tensor(lses, lse[None].contiguous())
    scaled, total = rescale(out, lses, group.rank_in_group, base2=base2)
    heads = out.shape[1] // group.world_size
    reduced = scaled.new_empty(heads, *scaled.shape[1:])
    group.reduce_scatter_tensor(reduced, scaled)
    first = group.rank_in_group * heads
    own, own_total = reduced.transpose(0, 1), total[:, first : first + heads]
    if sinks is None:
        return own.to(out.dtype), own_total
    return combine(
        own[None],
        own_total[None],
        out_dtype=out.dtype,
        base2=base2,
        sinks=sinks,
        return_lse=True,
    )


def symm(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Group,
    *,
    base2: bool = False,
    sinks: torch.Tensor | None = None,
    head_major: bool = False,
) -> Partial:
    """One kernel over symmetric memory, for what `prepare_symm` has prepared; else `a2a`.

    Batch size and dtype decide, which are the same on every rank.
    """
    kernel = _prepared_for(group, len(out), out.shape[1], out.shape[2], out.dtype)
    if kernel is None:
        return a2a(out, lse, group, base2=base2, sinks=sinks)
    reduced = kernel.reduce(
        out,
        lse,
        base2=base2,
        sinks=sinks,
        head_major=head_major,
        return_lse=True,
        layer=_layer,
    )
    assert reduced.lse is not None
    return reduced.out, reduced.lse


def exchange_splits(
    backend: str,
    splits: Splits,
    dtype: torch.dtype,
    group: Group,
    *,
    sinks: torch.Tensor | None = None,
    head_major: bool = False,
) -> Partial:
    """Exchange what has not been reduced over its splits yet: out [B, H/K, D] in dtype, and lse.

    A backend that `takes_splits` reduces a few of them where it sends them; many, and those of the
    others, are merged first.
    """
    B, H, _, D = splits.out.shape
    taken = splits.few and BACKENDS[backend].takes_splits
    if taken and (kernel := _prepared_for(group, B, H, D, dtype)):
        reduced = kernel.reduce_splits(
            splits, sinks=sinks, head_major=head_major, return_lse=True, layer=_layer
        )
        assert reduced.lse is not None
        return reduced.out, reduced.lse
    out, lse = splits.merged(dtype)
    return BACKENDS[backend].exchange(out, lse, group, sinks=sinks, head_major=head_major)


# What `symm` needs before its first call.

_prepared: dict[str, dict[tuple[int, int, torch.dtype], SymmExchange]] = {}
_layer = 0  # of the attention call that is under way


def prepare_symm(
    group: Group,
    *,
    max_tokens: int | None,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    timeout: float,
) -> SymmExchange:
    """Allocate what `symm` exchanges batches of one shape and dtype through, for one stream.

    Collective over the group: every rank calls it at the same point, before any graph is captured.
    Batches above max_tokens, and above `symm.largest_batch`, go to `a2a`. A second call for the
    same shape and dtype returns what the first one made, since captured graphs point to it.

    Args:
        group: GroupCoordinator of the KVP group, on CUDA.
        max_tokens: the largest batch; None where it is not known.
        num_heads: H, query heads of the whole group.
        head_dim: D of the output.
        dtype: of the partial outputs.
        timeout: seconds after which an exchange counts as stuck and ends the process.

    Raises:
        RuntimeError: there is no peer access inside the group; raised on every rank.
        ValueError: rows of head_dim elements are not whole 16-byte vectors.
    """
    from sglang_helix.srt.layers.dcp.symm import largest_batch
    from sglang_helix.srt.layers.dcp.symm_workspace import SymmExchange

    shapes = _prepared.setdefault(group.unique_name, {})
    shape = num_heads, head_dim, dtype
    if shape not in shapes:
        most = largest_batch(group.world_size, num_heads, head_dim, dtype)
        kernel = SymmExchange(
            group.cpu_group,
            min(max_tokens or most, most),
            num_heads,
            head_dim,
            dtype,
            group.device,
            timeout=timeout,
        )
        logger.info(
            "symm: batches of up to %d tokens of %d heads of %d elements (%s), in %.1f MiB of each "
            "rank; larger ones and other dtypes go to a2a",
            kernel.max_tokens,
            *shape,
            kernel.layout.nbytes / 2**20,
        )
        shapes[shape] = kernel
    return shapes[shape]


@dataclass(frozen=True)
class Backend:
    """One `--dcp-comm-backend`, and what the rest of the series has to know of it."""

    exchange: Exchange
    help: str = ""
    """What the flag's help says of it; empty for those that SGLang has itself."""
    prepare: Callable[..., SymmExchange] | None = None
    """What every rank calls between its model and its pool, for each shape; see `prepare_symm`."""
    takes_splits: bool = False
    """Whether it reduces `Splits` where it sends them."""


# Every backend but fi_a2a, which is upstream's from end to end. The first is the default where
# SGLang's own choice does not serve.
BACKENDS: dict[str, Backend] = {
    "a2a": Backend(a2a),
    "ag_rs": Backend(ag_rs),
    "symm": Backend(
        symm,
        "one kernel over symmetric memory; requires NVIDIA GPUs of one host with peer access to "
        "each other",
        prepare_symm,
        takes_splits=True,
    ),
}


def note_layer(module: Any, args: Any) -> None:
    """Forward pre-hook of attention modules: the layer that a stuck exchange is reported with.

    Exchanges are called from models and attention backends, not all of which know their layer.
    """
    global _layer
    _layer = module.layer_id


def _prepared_for(
    group: Group, tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> SymmExchange | None:
    """What exchanges such a batch; None where it goes to `a2a`."""
    if group.unique_name not in _prepared:
        raise RuntimeError(f"no symm exchange was prepared for the group {group.unique_name}")
    kernel = _prepared[group.unique_name].get((num_heads, head_dim, dtype))
    if kernel is None:
        _say_once("symm: %d heads of %d elements in %s go to a2a", num_heads, head_dim, dtype)
    elif tokens > kernel.max_tokens:
        _say_once("symm: batches of more than %d tokens go to a2a", kernel.max_tokens)
        return None
    return kernel


def largest_prepared(group: Group) -> int:
    """Tokens of the largest batch that everything prepared for a group takes; 0 without any."""
    kernels = _prepared.get(group.unique_name, {}).values()
    return min((kernel.max_tokens for kernel in kernels), default=0)


def slow_seconds(group: Group) -> list[float]:
    """By rank of a group: seconds in which this rank's `symm` waited milliseconds for it."""
    seconds = [0.0] * group.world_size
    for kernel in _prepared.get(group.unique_name, {}).values():
        for peer, more in dict(kernel.slow_seconds).items():
            if peer >= 0:
                seconds[peer] += more
    return seconds


@functools.cache
def _say_once(line: str, *values: object) -> None:
    """Log a line the first time: who asked for `symm` reads what it does not serve."""
    logger.info(line, *values)
