"""A launch of `symm`'s kernels: their arguments from a rank's workspace and its tensors.

An eager decode calls once a layer, so what follows from the form of a call's arguments is worked
out once for each form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from sglang_helix.srt.layers.dcp.partial import VECTOR_BYTES, Masked, Partial, Splits
from sglang_helix.srt.layers.dcp.symm import RECEIVE, SEND, exchange_kernel, gather_kernel
from sglang_helix.srt.layers.dcp.symm_layout import TL_DTYPE, Layout, QueryLayout, Slots

_MAX_REGISTERS = 128  # per thread
_WARPS_PER_SM = 65536 // (32 * _MAX_REGISTERS)  # resident on every GPU since Volta

L = TypeVar("L", bound=Slots)


@dataclass(frozen=True)
class Workspace(Generic[L]):
    """A rank's end of the exchange (of a `Layout`) or of the gather (of a `QueryLayout`).

    Attributes:
        layout: what stands where.
        peers: int64 [N] on the device: address of each rank's workspace.
        epochs: int64 [local_ranks, rows] on the device: each row's next call, from 1.
        status: int64 [local_ranks * warps] that the host can read: what programs wait for.
        rank: this rank (the first one, where one device plays several).
        warps: most warps per rank and launch. All of a launch must be resident on the device at
            once, or waiting ones could keep out those that peers wait for.
        memory: what the addresses in peers need kept alive.
        local_ranks: ranks that one launch plays; tensors stack their batches.
        calls: what was worked out for each form of a call's arguments.
    """

    layout: L
    peers: torch.Tensor
    epochs: torch.Tensor
    status: torch.Tensor
    rank: int
    warps: int
    memory: object
    local_ranks: int = 1
    calls: dict[tuple[object, ...], _Call] = field(default_factory=dict, init=False, repr=False)


def exchange(
    workspace: Workspace[Layout],
    partial: Partial | Splits | Masked,
    *,
    base2: bool = False,
    head_major: bool = False,
    sinks: torch.Tensor | None = None,
    drafts: int = 1,
    layer: int = 0,
    out_dtype: torch.dtype | None = None,
    phase: int = SEND | RECEIVE,
) -> Partial:
    """One launch: send partial rows to their owners, receive and combine the rows of own heads.

    Args:
        workspace: this rank's end.
        partial: out [B, H, D] in the exchange's dtype and lse [B, H] fp32; any strides, but rows
            that are not whole 16-byte vectors cost a copy. The same masked: rows that are empty
            leave as those of an LSE of -inf do. Or splits, which are merged in fp32 and
            rounded once: that takes the place of the split-KV reduction (stage 2).
        base2: the LSE, in and out, is a base-2 logarithm; that of splits is natural.
        head_major: write [h, B, D] (for the MLA value up-projection) and return its [B, h, D] view.
        sinks: [h] attention sinks of this rank's own heads, natural logarithm, any float dtype:
            each adds its exponential to the softmax sum of its head, once. They belong here, not in
            the partial results, or every rank would count them.
        drafts: there are so many for each head and request: H and h are as many times larger, each
            rank's heads one after the other, and B is as many times smaller. N divides the heads.
        layer: 0 to 65535; named when the exchange is stuck.
        out_dtype: of the result, by default the exchange's; for proofs.
        phase: for proofs: SEND and RECEIVE in two launches.

    Returns:
        out [B, h, D] and lse [B, h] of the heads the rank owns; the LSE includes the sinks.

    Raises:
        ValueError: a shape does not fit, or B exceeds the workspace's largest batch.
        TypeError: a dtype does not fit.
    """
    splits = partial if isinstance(partial, Splits) else None
    empty = partial.empty if isinstance(partial, Masked) else None
    x, lse = partial[0], partial[1]
    form = (
        *map(_form, (x, lse, sinks)),
        None if splits is None else (len(splits.indptr), len(splits.counts)),
        None if empty is None else (empty.shape, empty.stride(), empty.dtype),
        *(base2, head_major, drafts, out_dtype, phase),
    )
    call = workspace.calls.get(form)
    if call is None:
        options = base2, head_major, drafts, out_dtype or workspace.layout.wire, phase
        call = workspace.calls[form] = _prepare(workspace, partial, sinks, *options)
    out = x.new_empty_strided(*call.out, dtype=call.dtype)
    out_lse = lse.new_empty(call.out[0][:2])
    if call.tokens == 0:  # on every rank: the epochs stand still together
        return Partial(out, out_lse)
    if call.copies:
        x = x.contiguous()
    exchange_kernel[call.grid](
        x,
        lse,
        workspace.peers,
        workspace.epochs,
        out,
        out_lse,
        sinks,
        workspace.status,
        None if splits is None else splits.indptr,
        None if splits is None else splits.counts,
        empty,
        workspace.rank,
        call.tokens,
        layer,
        *call.strides,
        1 if splits is None else splits.block,
        1.0 if splits is None else splits.v_scale,
        **call.options,
    )
    return Partial(out, out_lse)


def gather(
    workspace: Workspace[QueryLayout],
    parts: Sequence[torch.Tensor],
    *,
    layer: int = 0,
    phase: int = SEND | RECEIVE,
) -> torch.Tensor:
    """One launch: send this rank's queries to all ranks, and receive everybody's.

    Args:
        workspace: this rank's end.
        parts: [T, H/N, W_i] in the layout's dtype and widths; any strides, but where vectors of a
            head are not whole 16-byte ones all parts are copied.
        layer: 0 to 65535; named when the gather is stuck.
        phase: for proofs: SEND and RECEIVE in two launches.

    Returns:
        [T, H, sum W_i], contiguous: rank j's heads are [j * H/N, (j + 1) * H/N).

    Raises:
        ValueError: a shape does not fit, or T exceeds the workspace's largest batch.
        TypeError: a dtype does not fit.
    """
    form = (*map(_form, parts), phase)
    call = workspace.calls.get(form)
    if call is None:
        call = workspace.calls[form] = _prepare_gather(workspace, parts, phase)
    out = parts[0].new_empty_strided(*call.out)
    if call.tokens == 0:  # on every rank: the epochs stand still together
        return out
    if call.copies:
        parts = [part.contiguous() for part in parts]
    left, right = parts if len(parts) == 2 else (parts[0], None)
    gather_kernel[call.grid](
        left,
        right,
        workspace.peers,
        workspace.epochs,
        out,
        workspace.status,
        workspace.rank,
        call.tokens,
        layer,
        *call.strides,
        **call.options,
    )
    return out


class _Call(NamedTuple):
    """What follows from the forms of a call's arguments: the host works it out once for each."""

    tokens: int
    """Of each rank."""
    copies: bool
    """Whether what is sent is copied, to be vectors."""
    out: tuple[torch.Size, tuple[int, ...]]
    """Shape and strides of the result."""
    dtype: torch.dtype
    grid: tuple[int, int]
    strides: tuple[int, ...]
    options: Mapping[str, Any]


def _form(x: torch.Tensor | None) -> tuple[object, ...] | None:
    """All that decides how a tensor may be read, but where it is."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.data_ptr() % VECTOR_BYTES


def _prepare(
    workspace: Workspace[Layout],
    partial: Partial | Splits | Masked,
    sinks: torch.Tensor | None,
    base2: bool,
    head_major: bool,
    drafts: int,
    dtype: torch.dtype,
    phase: int,
) -> _Call:
    layout, splits = workspace.layout, isinstance(partial, Splits)
    x, lse = partial[0], partial[1]
    tokens = _check_partial(workspace, partial, base2, drafts)
    # Those the rank owns, or places of each where there are several.
    several = workspace.local_ranks > 1
    owned = layout.owned if several else len(layout.owned_by(workspace.rank))
    heads, B, D = owned * drafts, len(x), layout.head_dim
    _check_result(dtype, sinks, workspace.local_ranks * heads)
    if head_major:
        out = torch.empty((heads, B, D), dtype=dtype, device="meta").transpose(0, 1)
    else:
        out = torch.empty((B, heads, D), dtype=dtype, device="meta")
    copies = not splits and not _rows_are_vectors(x)
    if copies:
        x = torch.empty_like(x, device="meta", memory_format=torch.contiguous_format)
    warps = layout.warps(splits)
    strides = (
        *(_vectors(x) if splits else (*_vectors(x), 0)),
        *(lse.stride() if splits else (*lse.stride(), 0)),
        *_vectors(out),
        *(heads, 1),
    )
    options = {
        **layout.constants,
        "HEADS": layout.heads * drafts,
        "OWNED": layout.owned * drafts,
        "SPLITS": splits,
        "BASE2": base2,
        **_launched(workspace, warps, phase),
    }
    grid = _grid(workspace, tokens * drafts, warps)
    return _Call(tokens, copies, (out.shape, out.stride()), dtype, grid, strides, options)


def _prepare_gather(
    workspace: Workspace[QueryLayout], parts: Sequence[torch.Tensor], phase: int
) -> _Call:
    layout = workspace.layout
    tokens = _check_queries(workspace, parts)
    copies = not all(map(_rows_are_vectors, parts))
    if copies:
        parts = [
            torch.empty_like(part, device="meta", memory_format=torch.contiguous_format)
            for part in parts
        ]
    steps = [step for part in parts for step in _vectors(part)]
    shape = torch.Size((len(parts[0]), layout.heads, sum(layout.widths)))
    return _Call(
        tokens,
        copies,
        (shape, torch.empty(shape, device="meta").stride()),
        layout.wire,
        _grid(workspace, tokens, layout.warps),
        (*steps, 0, 0)[:4],
        {**layout.constants, **_launched(workspace, layout.warps, phase)},
    )


def _grid(workspace: Workspace[L], tokens: int, warps: int) -> tuple[int, int]:
    """Programs of so many warps, and ranks."""
    rows = tokens * workspace.layout.rows_per_token
    return min(rows, max(1, workspace.warps // warps)), workspace.local_ranks


def _launched(workspace: Workspace[L], warps: int, phase: int) -> dict[str, Any]:
    return {
        "PHASE": phase,
        "num_warps": warps,
        "maxnreg": _MAX_REGISTERS,
        # Ranks on one device could keep each other out; one rank's programs always fit.
        "launch_cooperative_grid": workspace.local_ranks > 1,
    }


def resident_warps(device: torch.device, local_ranks: int = 1) -> int:
    """`Workspace.warps` for a GPU; a cooperative launch checks it again."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return _WARPS_PER_SM * multiprocessors // local_ranks


def _rows_are_vectors(x: torch.Tensor) -> bool:
    """Whether every row starts on a 16-byte vector and is contiguous."""
    *steps, step = x.stride()
    vector = VECTOR_BYTES // x.element_size()
    return (
        step == 1
        and x.data_ptr() % VECTOR_BYTES == 0
        and (
            all(step % vector == 0 for step in steps)
            or all(  # what has one element takes no step
                step % vector == 0 for size, step in zip(x.shape, steps, strict=False) if size > 1
            )
        )
    )


def _vectors(x: torch.Tensor) -> list[int]:
    """Strides of rows in 16-byte vectors."""
    vector = VECTOR_BYTES // x.element_size()
    sizes, steps = x.shape, x.stride()
    return [steps[dim] // vector if sizes[dim] > 1 else 0 for dim in range(len(sizes) - 1)]


def _check_partial(
    workspace: Workspace[Layout], partial: Partial | Splits | Masked, base2: bool, drafts: int
) -> int:
    """Tokens per rank of a valid partial, as rows of the heads that it has."""
    layout, (x, lse) = workspace.layout, partial[:2]
    shape, heads = x.shape, layout.heads * drafts
    if isinstance(partial, Splits):
        expected, dims, dtype = "[B, H, S, D]", 4, torch.float32
        if base2:
            raise ValueError("the LSE of splits is a natural logarithm: base2 does not apply")
        if not _rows_are_vectors(x):
            raise ValueError(f"rows of splits must be 16-byte vectors, got strides {x.stride()}")
        if len(partial.indptr) <= len(x) or len(partial.counts) < len(x):
            raise ValueError(
                f"splits of {len(x)} sequences need as many counts and one more in indptr, got "
                f"{len(partial.counts)} and {len(partial.indptr)}"
            )
    else:
        expected, dims, dtype = "[B, H, D]", 3, layout.wire
    if len(shape) != dims or shape[1] != heads or shape[-1] != layout.head_dim:
        raise ValueError(
            f"the partial output must be {expected} with H = {heads}, "
            f"D = {layout.head_dim}, got {list(shape)}"
        )
    if drafts > 1 and layout.heads % layout.ranks:
        raise ValueError(f"drafts of {layout.heads} heads do not divide among {layout.ranks} ranks")
    if x.dtype != dtype or lse.dtype != torch.float32:
        raise TypeError(f"expected {dtype} with an fp32 lse, got {x.dtype} and {lse.dtype}")
    if lse.shape != shape[:-1]:
        raise ValueError(f"lse must be {list(shape[:-1])}, got {list(lse.shape)}")
    if isinstance(partial, Masked):
        empty = partial.empty
        if empty.shape != shape[:1] or empty.dtype != torch.bool or not empty.is_contiguous():
            raise ValueError(
                f"what says that rows are empty must be contiguous bool {list(shape[:1])}, got "
                f"{empty.dtype} {list(empty.shape)}"
            )
    tokens = shape[0] // workspace.local_ranks
    if tokens * drafts > layout.max_tokens:
        raise ValueError(
            f"symm was set up for at most {layout.max_tokens} tokens per call and got "
            f"{tokens * drafts}: raise max_tokens, or use --dcp-comm-backend a2a for such batches"
        )
    return tokens


def _check_queries(workspace: Workspace[QueryLayout], parts: Sequence[torch.Tensor]) -> int:
    """Tokens per rank of queries that fit the workspace."""
    layout = workspace.layout
    T = len(parts[0])
    expected = [(T, layout.owned, width) for width in layout.widths]
    got = [tuple(part.shape) for part in parts]
    if got != expected:
        raise ValueError(f"the parts of queries must be {expected}, got {got}")
    if any(part.dtype != layout.wire for part in parts):
        raise TypeError(f"expected {layout.wire}, got {[part.dtype for part in parts]}")
    tokens = T // workspace.local_ranks
    if tokens > layout.max_tokens:
        raise ValueError(
            f"symm was set up to gather at most {layout.max_tokens} tokens per call and got "
            f"{tokens}: raise max_tokens, or gather such batches by the group"
        )
    return tokens


def _check_result(dtype: torch.dtype, sinks: torch.Tensor | None, own_heads: int) -> None:
    if dtype not in TL_DTYPE:
        raise TypeError(f"the result must be bf16, fp16 or fp32, got {dtype}")
    if sinks is not None and (sinks.shape != (own_heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be contiguous [{own_heads}], got {list(sinks.shape)}")
