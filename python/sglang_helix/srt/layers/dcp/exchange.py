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
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_helix.srt.layers.dcp.lse_combine import combine, combine_splits, merge, pack, rescale
from sglang_helix.srt.layers.dcp.packed_rows import unpack
from sglang_helix.srt.layers.dcp.partial import VECTOR_BYTES, Masked, Partial, Splits

if TYPE_CHECKING:
    from sglang_helix.srt.layers.dcp.symm_workspace import SymmExchange, SymmGather

logger = logging.getLogger(__name__)

# GroupCoordinator of the KVP group; SGLang is untyped.
Group = Any

GATHER_VARIABLE = "HELIX_SYMM_GATHER"


def gathers_by_kernel() -> bool:
    """Whether queries are to be gathered by a backend's own kernel, where it has one.

    Between 2 GPUs it was faster than the all-gather at every size (docs/figures/gather-h200x2.csv);
    between more it was not run. Who wants the all-gather, to look for a fault or for more GPUs,
    sets the variable to 0.
    """
    return os.environ.get(GATHER_VARIABLE) != "0"


class Collective(Protocol):
    """An exchange by the collectives of a group, which is a GroupCoordinator."""

    def __call__(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        group: Group,
        *,
        base2: bool = False,
        sinks: torch.Tensor | None = None,
    ) -> Partial:
        """(out [B, H, D], lse [B, H]) -> (out [B, H/K, D] in out's dtype, lse [B, H/K])."""


def a2a(
    out: torch.Tensor,
    lse: torch.Tensor,
    group: Group,
    *,
    base2: bool = False,
    sinks: torch.Tensor | None = None,
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
) -> Partial:
    """All-gather of the LSEs, then a reduce-scatter of the rescaled outputs in fp32."""
    lses = lse.new_empty(group.world_size, *lse.shape)
    group.all_gather_into_tensor(lses, lse[None].contiguous())
    scaled, total = rescale(out, lses, group.rank_in_group, base2=base2)
    heads = out.shape[1] // group.world_size
    reduced = scaled.new_empty(heads, *scaled.shape[1:])
    group.reduce_scatter_tensor(reduced, scaled)
    first = group.rank_in_group * heads
    own = Partial(reduced.transpose(0, 1), total[:, first : first + heads])
    return merge(own, None, out_dtype=out.dtype, base2=base2, sinks=sinks, return_lse=True)


@dataclass(frozen=True)
class Backend:
    """One `--dcp-comm-backend`, and what the rest of the series has to know of it."""

    collective: Collective
    """What carries a batch; with a kernel, those that it was not made for."""
    help: str = ""
    """What the flag's help says of it; empty for those that SGLang has itself."""
    kernel: Callable[..., SymmExchange] | None = None
    """What makes its own kernel for batches of one shape and dtype; see `Exchanger.prepare`."""
    query_kernel: Callable[..., SymmGather | None] | None = None
    """What makes one that gathers queries of a shape and dtype, if it serves them."""


def _symm(
    group: Group, max_tokens: int | None, shape: tuple[int, int, torch.dtype], timeout: float
) -> SymmExchange:
    from sglang_helix.srt.layers.dcp.symm_layout import Layout, largest_batch
    from sglang_helix.srt.layers.dcp.symm_workspace import SymmExchange

    most = largest_batch(Layout(group.world_size, *shape, 0), max_tokens)
    kernel = SymmExchange(group.cpu_group, most, *shape, group.device, timeout=timeout)
    logger.info(
        "symm: batches of up to %d tokens of %d heads of %d elements (%s), in %.1f MiB of each "
        "rank; larger ones and other dtypes go to a2a",
        kernel.max_tokens,
        *shape,
        kernel.layout.nbytes / 2**20,
    )
    return kernel


def _symm_gather(
    group: Group,
    max_tokens: int | None,
    shape: tuple[int, tuple[int, ...], torch.dtype],
    timeout: float,
) -> SymmGather | None:
    from sglang_helix.srt.layers.dcp.symm_layout import QueryLayout, largest_batch
    from sglang_helix.srt.layers.dcp.symm_workspace import SymmGather

    _, widths, dtype = shape
    if any(width * dtype.itemsize % VECTOR_BYTES for width in widths):
        logger.info("symm: queries of %s elements (%s) are all-gathered", widths, dtype)
        return None
    most = largest_batch(QueryLayout(group.world_size, *shape, 0), max_tokens)
    kernel = SymmGather(group.cpu_group, most, *shape, group.device, timeout=timeout)
    logger.info(
        "symm: queries of up to %d tokens of %d heads of %s elements (%s) are gathered in %.1f MiB "
        "of each rank; others are all-gathered",
        kernel.max_tokens,
        *shape,
        kernel.layout.nbytes / 2**20,
    )
    return kernel


# Every backend but fi_a2a, which is upstream's from end to end. The first is the default where
# SGLang's own choice does not serve.
BACKENDS: dict[str, Backend] = {
    "a2a": Backend(a2a),
    "ag_rs": Backend(ag_rs),
    "symm": Backend(
        a2a,
        "one kernel over symmetric memory; requires NVIDIA GPUs of one host with peer access to "
        "each other",
        _symm,
        _symm_gather,
    ),
}


class Exchanger:
    """The exchange of a KVP group, for as long as a server lives; its group has it as `exchanger`.

    All ranks make the same calls in the same order, on one stream at a time.

    Args:
        backend: one of BACKENDS.
        group: GroupCoordinator of the KVP group.
    """

    layer = -1
    """Of the attention call that is under way; a stuck exchange is reported with it.

    Attention says it, since MLA's exchanges are called from its model, which does not. -1: unknown.
    """

    def __init__(self, backend: str, group: Group) -> None:
        self.name, self.backend, self.group = backend, BACKENDS[backend], group
        self._kernels: dict[tuple[int, int, torch.dtype], SymmExchange] = {}
        self._gathers: dict[tuple[int, tuple[int, ...], torch.dtype], SymmGather] = {}

    def prepare(
        self,
        *,
        max_tokens: int | None,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        timeout: float,
    ) -> None:
        """Allocate what a backend's own kernel exchanges batches of one shape and dtype through.

        Collective over the group: every rank calls it at the same point, before any graph is
        captured. Batches above max_tokens, and above `symm_layout.largest_batch`, go to `a2a`. A
        second call for the same shape and dtype leaves what the first one made, since captured
        graphs point to it. Nothing, where the backend has no kernel.

        Args:
            max_tokens: the largest batch; None where it is not known.
            num_heads: H, query heads of the whole group.
            head_dim: D of the output.
            dtype: of the partial outputs.
            timeout: seconds after which an exchange counts as stuck and ends the process.

        Raises:
            RuntimeError: there is no peer access inside the group; raised on every rank.
            ValueError: rows of head_dim elements are not whole 16-byte vectors.
        """
        shape = num_heads, head_dim, dtype
        if self.backend.kernel and shape not in self._kernels:
            kernel = self.backend.kernel(self.group, max_tokens, shape, timeout)
            self._kernels[shape] = kernel

    def prepare_queries(
        self,
        *,
        max_tokens: int | None,
        num_heads: int,
        widths: tuple[int, ...],
        dtype: torch.dtype,
        timeout: float,
    ) -> None:
        """The same for what gathers queries of one shape and dtype.

        Args:
            max_tokens: the largest batch; None where it is not known. Larger ones are gathered by
                the group, as those are for which nothing was prepared.
            num_heads: H, query heads of the whole group.
            widths: elements of each part of a query.
            dtype: of the queries.
            timeout: see `prepare`.

        Raises:
            RuntimeError: see `prepare`.
        """
        shape, make = (num_heads, widths, dtype), self.backend.query_kernel
        if make and shape not in self._gathers:
            kernel = make(self.group, max_tokens, shape, timeout)
            if kernel is not None:
                self._gathers[shape] = kernel

    def gathered(self, parts: Sequence[torch.Tensor], layer: int = -1) -> torch.Tensor | None:
        """Each rank's parts [T, H/K, W_i] of queries -> those of all heads [T, H, sum W_i].

        By what was prepared for them, contiguous; None where the group's all-gather is to do it.
        That goes by shapes and dtype, which are the same on every rank.
        """
        if not self._gathers:
            return None
        tokens, own, _ = parts[0].shape
        widths = tuple(part.shape[-1] for part in parts)
        shape = own * self.group.world_size, widths, parts[0].dtype
        kernel = self._gathers.get(shape)
        if kernel is None:
            _say_once("symm: queries of %d heads of %s elements in %s are all-gathered", *shape)
        elif tokens > kernel.max_tokens:
            _say_once("symm: queries of more than %d tokens are all-gathered", kernel.max_tokens)
        else:
            return kernel(parts, layer=layer)
        return None

    def __call__(
        self,
        partial: Partial | Splits | Masked,
        dtype: torch.dtype | None = None,
        *,
        base2: bool = False,
        sinks: torch.Tensor | None = None,
        head_major: bool = False,
        drafts: int = 1,
    ) -> Partial:
        """Partial results of the group's heads [B, H] -> this rank's own heads [B, H/K].

        A few splits are reduced where a kernel sends them; many, and those of other backends, are
        merged first. What is masked is marked where a kernel sends it, or else first. Batch size
        and dtype decide, which are the same on every rank.

        Args:
            dtype: what travels, and that of the result; by default that of `partial.out`.
            base2: the LSE, in and out, is a base-2 logarithm; that of splits is natural.
            sinks: see above.
            head_major: lay the output out as [H/K, B, D], where that costs nothing.
            drafts: there are so many for each head and request: see `drafts.Drafted`.
        """
        dtype = dtype or partial.out.dtype
        kernel = self._kernel(partial, dtype, drafts)
        splits = partial if isinstance(partial, Splits) else None
        if splits is not None and not (kernel and splits.few):
            partial = combine_splits(splits, dtype)
        elif splits is None:
            if isinstance(partial, Masked) and not kernel:
                partial = partial.marked()
            partial = partial._replace(out=partial.out.to(dtype))
        if kernel:
            return kernel(
                partial,
                base2=base2,
                sinks=sinks,
                head_major=head_major,
                drafts=drafts,
                layer=self.layer,
            )
        assert isinstance(partial, Partial)
        return self.backend.collective(*partial, self.group, base2=base2, sinks=sinks)

    def _kernel(
        self, partial: Partial | Splits | Masked, dtype: torch.dtype, drafts: int
    ) -> SymmExchange | None:
        """What exchanges such a batch; None where a collective does."""
        if not self.backend.kernel:
            return None
        if not self._kernels:
            raise RuntimeError(
                f"no {self.name} exchange was prepared for the group {self.group.unique_name}"
            )
        tokens, heads = len(partial.out) * drafts, partial.out.shape[1] // drafts
        head_dim = partial.out.shape[-1]
        kernel = self._kernels.get((heads, head_dim, dtype))
        if kernel is None:
            _say_once("symm: %d heads of %d elements in %s go to a2a", heads, head_dim, dtype)
        elif tokens > kernel.max_tokens:
            _say_once("symm: batches of more than %d tokens go to a2a", kernel.max_tokens)
            return None
        return kernel

    @property
    def takes_splits(self) -> bool:
        """Whether splits are reduced where they are sent."""
        return self.backend.kernel is not None

    def largest_prepared(self, head_dim: int | None = None) -> int:
        """Tokens of the largest batch that everything prepared takes; 0 without any.

        head_dim: what is prepared for such heads alone.
        """
        found = (
            kernel.max_tokens
            for (_, width, _), kernel in self._kernels.items()
            if head_dim in (None, width)
        )
        return min(found, default=0)

    @property
    def slow_seconds(self) -> list[float]:
        """By rank: seconds in which this rank's kernel waited milliseconds for it."""
        seconds = [0.0] * self.group.world_size
        kernels: list[SymmExchange | SymmGather] = [*self._kernels.values()]
        for kernel in [*kernels, *self._gathers.values()]:
            for peer, more in dict(kernel.slow_seconds).items():
                if peer >= 0:
                    seconds[peer] += more
        return seconds


@functools.cache
def _say_once(line: str, *values: object) -> None:
    """Log a line the first time: who asked for `symm` reads what it does not serve."""
    logger.info(line, *values)
