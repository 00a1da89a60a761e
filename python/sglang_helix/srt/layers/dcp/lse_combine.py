"""Softmax-exact combination of partial attention outputs, and the forms they travel in.

Attention over a sequence that is split among N ranks gives N partial outputs o_n with the
log-sum-exp l_n of their scores. With m = max l_n and w_n = exp(l_n - m), attention over the whole
sequence is sum(w_n o_n) / sum(w_n), and its LSE is m + log sum(w_n) (Milakov and Gimelshein,
arXiv:1805.02867). `combine` computes it from shards that lie together, after an all-to-all of what
`pack` lays out. `rescale` gives one rank's summand, for a reduction over the ranks.

Two implementations of the same contract stand side by side: Triton kernels, and plain torch where
Triton cannot run (CPU tensors, no triton installed). ``TRITON_INTERPRET=1`` selects the kernels for
CPU tensors too.

A shard without tokens has LSE -inf; NaN and +inf mean the same. Whatever stands in its output, NaN
included, never reaches the result. Where all shards are empty the result is 0 with LSE -inf.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple, overload

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the plain torch implementation needs nothing
    triton = None

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PAYLOADS = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_TAIL = (
    16  # bytes behind each packed payload: the fp32 LSE, padded so that rows stay 16-byte aligned
)
_LOG2_E = 1.4426950408889634


@overload
def combine(
    partials: torch.Tensor,
    lse: torch.Tensor,
    *,
    out: torch.Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
    base2: bool = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def combine(
    partials: torch.Tensor,
    lse: torch.Tensor,
    *,
    out: torch.Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
    base2: bool = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def combine(
    partials: torch.Tensor,
    lse: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    base2: bool = False,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Merge N partial attention outputs into the output over all their tokens.

    Args:
        partials: [N, B, h, D] bf16, fp16 or fp32, any strides. Accumulation is in fp32.
        lse: [N, B, h] fp32, any strides; natural logarithm, or base 2 with ``base2``.
        out: [B, h, D] tensor to write to, any strides, apart from ``partials``; None allocates it.
        out_dtype: bf16, fp16 or fp32; by default that of ``out``, or else of ``partials``.
        base2: the LSE, in and out, is a base-2 logarithm.
        sinks: [h] of any float dtype, natural logarithm: each is one more shard of its head, with
            this LSE and an output of 0. -inf is none.
        return_lse: also return the LSE of the result, the sinks included.

    Returns:
        ``out``, or ``(out, lse [B, h] fp32)`` with ``return_lse``.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported; fp8 is not, since its scale is not known here.
    """
    _check_combine(partials, lse, out, out_dtype, sinks)
    _, B, h, D = partials.shape
    if out is None:
        out = partials.new_empty((B, h, D), dtype=out_dtype)
    out_lse = lse.new_empty((B, h)) if return_lse else None
    if lse.numel():
        run = _combine_triton if _runs_triton(partials) else _combine_torch
        run(partials, lse, out, out_lse, base2, sinks)
    return out if out_lse is None else (out, out_lse)


@overload
def merge(
    whole: tuple[torch.Tensor, torch.Tensor],
    part: tuple[torch.Tensor, torch.Tensor],
    *,
    first: int = ...,
    out_dtype: torch.dtype,
    base2: bool = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def merge(
    whole: tuple[torch.Tensor, torch.Tensor],
    part: tuple[torch.Tensor, torch.Tensor],
    *,
    first: int = ...,
    out_dtype: torch.dtype,
    base2: bool = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def merge(
    whole: tuple[torch.Tensor, torch.Tensor],
    part: tuple[torch.Tensor, torch.Tensor],
    *,
    first: int = 0,
    out_dtype: torch.dtype,
    base2: bool = False,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Merge two partial outputs that lie apart, the second of some of the first's queries.

    Args:
        whole: out [B, h, D] bf16, fp16 or fp32 and lse [B, h] fp32, any strides.
        part: the same of queries first to first + b, in any of these dtypes: [b, h, D] and [b, h].
        first: the first of these queries.
        out_dtype: bf16, fp16 or fp32.
        base2, sinks, return_lse: as in `combine`; sinks are of all queries.

    Returns:
        out [B, h, D] in out_dtype, or ``(out, lse [B, h] fp32)`` with ``return_lse``.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported.
    """
    _check_merge(whole, part, first, out_dtype, sinks)
    out = whole[0].new_empty(whole[0].shape, dtype=out_dtype)
    out_lse = whole[1].new_empty(whole[1].shape) if return_lse else None
    if out.numel():
        run = _merge_triton if _runs_triton(out) else _merge_torch
        run(whole, part, first, out, out_lse, base2, sinks)
    return out if out_lse is None else (out, out_lse)


def combine_splits(
    partials: torch.Tensor,
    lse: torch.Tensor,
    indptr: torch.Tensor,
    counts: torch.Tensor,
    block: int,
    *,
    out_dtype: torch.dtype,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the splits of each sequence, of which each has its own number; see `partial.Splits`.

    Args:
        partials: [B, H, S, D] fp32, any strides. Splits without tokens may hold anything.
        lse: [B, H, S] fp32, natural logarithm, any strides; likewise.
        indptr: [B+1] integer, prefix sums of lengths.
        counts: [B] integer, splits per sequence.
        block: tokens that splits are whole multiples of.
        out_dtype: bf16, fp16 or fp32.
        scale: the result is multiplied by it.

    Returns:
        out [B, H, D] and lse [B, H] fp32; 0 and -inf for sequences without tokens.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported.
    """
    _check_splits(partials, lse, indptr, counts, out_dtype)
    B, H, _, D = partials.shape
    out = partials.new_empty((B, H, D), dtype=out_dtype)
    out_lse = lse.new_empty((B, H))
    if lse.numel():
        run = _combine_splits_triton if _runs_triton(partials) else _combine_splits_torch
        run(partials, lse, indptr, counts, block, scale, out, out_lse)
    return out, out_lse


def rescale(
    out: torch.Tensor, lses: torch.Tensor, rank: int, *, base2: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight a rank's partial output by its share of the softmax sum over all ranks.

    Args:
        out: [B, H, D] bf16, fp16 or fp32, any strides: the partial output of ``rank``.
        lses: [N, B, H] fp32, any strides: the LSEs of all ranks; natural logarithm, or base 2
            with ``base2``.
        rank: whose output it is, in [0, N).
        base2: the LSE, in and out, is a base-2 logarithm.

    Returns:
        scaled: contiguous fp32 [H, B, D]. Its sum over the ranks is the output over all tokens;
            heads come first, so that a reduce-scatter splits heads. Zeros where this rank has no
            token, whatever ``out`` holds there.
        total: fp32 [B, H], the LSE over all ranks.

    Raises:
        ValueError: shapes or devices do not fit together, or there is no such rank.
        TypeError: a dtype is not supported; fp8 is not, since its scale is not known here.
    """
    _check_rescale(out, lses, rank)
    B, H, D = out.shape
    scaled = out.new_empty((H, B, D), dtype=torch.float32)
    total = lses.new_empty((B, H))
    if total.numel():
        run = _rescale_triton if _runs_triton(out) else _rescale_torch
        run(out, lses, rank, scaled, total, base2)
    return scaled, total


def packed_row_bytes(D: int, dtype: torch.dtype) -> int:
    """Bytes of one packed row: D elements padded to 16 bytes, then 16 bytes with the fp32 LSE."""
    return -(-D * dtype.itemsize // 16) * 16 + _TAIL


def pack(
    out: torch.Tensor, lse: torch.Tensor, num_ranks: int, send: torch.Tensor | None = None
) -> torch.Tensor:
    """Lay a partial output and its LSE out by owner rank, for one all-to-all of bytes.

    Rank n owns heads [n*H/N, (n+1)*H/N). A row is one token and head: see `packed_row_bytes`.
    NaN and +inf LSE leave as -inf.

    Args:
        out: [B, H, D], any strides, any dtype of 1, 2 or 4 bytes: payloads, fp8 too, move as bytes.
        lse: [B, H] fp32, any strides.
        num_ranks: N; H must be divisible by it.
        send: contiguous uint8 [N, B, H/N, row bytes] to write to; None allocates it.

    Returns:
        The send buffer. What arrives after the exchange has the same shape and goes to `unpack`.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported.
    """
    _check_pack(out, lse, num_ranks, send)
    B, H, D = out.shape
    if send is None:
        row = packed_row_bytes(D, out.dtype)
        send = torch.empty(
            (num_ranks, B, H // num_ranks, row), dtype=torch.uint8, device=out.device
        )
    if send.numel():
        bits = _BITS[out.dtype.itemsize]
        run = _pack_triton if _runs_triton(out) else _pack_torch
        run(out.view(bits), lse, send)
    return send


def unpack(recv: torch.Tensor, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of packed rows, without a copy: partials [N, B, h, D] and lse [N, B, h] for `combine`.

    Args:
        recv: contiguous uint8 [N, B, h, row bytes], as `pack` lays it out.
        D: elements of a payload.
        dtype: the payload's.

    Raises:
        ValueError: ``recv`` does not hold such rows.
        TypeError: ``recv`` is not uint8.
    """
    _check_packed("recv", recv, D, dtype)
    payload = recv[..., : D * dtype.itemsize].view(dtype)
    lse = recv[..., -_TAIL : -_TAIL + 4].view(torch.float32)[..., 0]
    return payload, lse


def _runs_triton(x: torch.Tensor) -> bool:
    return triton is not None and (x.is_cuda or _INTERPRETED)


def _without_tokens(lse: torch.Tensor) -> torch.Tensor:
    return ~lse.isfinite()


def _combine_torch(
    partials: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
    base2: bool,
    sinks: torch.Tensor | None = None,
) -> None:
    share, total = _shares(lse, base2, sinks)
    values = partials.float().masked_fill(_without_tokens(lse)[..., None], 0)
    out.copy_((values * share[..., None]).sum(0))
    if out_lse is not None:
        out_lse.copy_(total)


def _merge_torch(
    whole: tuple[torch.Tensor, torch.Tensor],
    part: tuple[torch.Tensor, torch.Tensor],
    first: int,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
    base2: bool,
    sinks: torch.Tensor | None,
) -> None:
    some = slice(first, first + len(part[0]))
    lses = torch.stack([whole[1], torch.full_like(whole[1], -torch.inf)])
    lses[1, some] = part[1]
    share, total = _shares(lses, base2, sinks)
    values = whole[0].float().masked_fill(_without_tokens(lses[0])[..., None], 0)
    values = values * share[0][..., None]
    added = part[0].float().masked_fill(_without_tokens(part[1])[..., None], 0)
    values[some] += added * share[1, some][..., None]
    out.copy_(values)
    if out_lse is not None:
        out_lse.copy_(total)


def _combine_splits_torch(
    partials: torch.Tensor,
    lse: torch.Tensor,
    indptr: torch.Tensor,
    counts: torch.Tensor,
    block: int,
    scale: float,
    out: torch.Tensor,
    out_lse: torch.Tensor,
) -> None:
    B, _, S = lse.shape
    lens = indptr[1 : B + 1] - indptr[:B]
    share = -(-lens // counts[:B].clamp_min(1))
    share = -(-share // block) * block
    written = torch.arange(S, device=lse.device) * share[:, None] < lens[:, None]
    lse = lse.masked_fill(~written[:, None], -torch.inf)
    merged = torch.empty_like(out, dtype=torch.float32)
    _combine_torch(partials.movedim(2, 0), lse.movedim(2, 0), merged, out_lse, base2=False)
    out.copy_(merged * scale)


def _rescale_torch(
    out: torch.Tensor,
    lses: torch.Tensor,
    rank: int,
    scaled: torch.Tensor,
    total: torch.Tensor,
    base2: bool,
) -> None:
    share, lse = _shares(lses, base2)
    values = out.float().masked_fill(_without_tokens(lses[rank])[..., None], 0)
    scaled.copy_((values * share[rank][..., None]).transpose(0, 1))
    total.copy_(lse)


def _shares(
    lse: torch.Tensor, base2: bool, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of LSEs [N, ..., h]: each shard's share of the softmax sum, and the LSE of the sum."""
    lse = lse.masked_fill(_without_tokens(lse), -torch.inf)
    top = lse.amax(0)
    if sinks is not None:
        sinks = sinks.float() * _LOG2_E if base2 else sinks.float()
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == -torch.inf, 0)
    power = torch.exp2 if base2 else torch.exp
    weight = power(lse - top)
    total = weight.sum(0)  # at least 1, or 0 where all shards are empty
    if sinks is not None:
        total = total + power(sinks - top)
    return weight / total.clamp_min(1), top + (total.log2() if base2 else total.log())


def _pack_torch(out: torch.Tensor, lse: torch.Tensor, send: torch.Tensor) -> None:
    payload, packed_lse = unpack(send, out.shape[-1], out.dtype)
    N, B, h, D = payload.shape
    payload.copy_(out.view(B, N, h, D).transpose(0, 1))
    lse = lse.masked_fill(_without_tokens(lse), -torch.inf)
    send[..., -_TAIL:] = 0
    packed_lse.copy_(lse.view(B, N, h).transpose(0, 1))


if triton is not None:

    @triton.jit
    def _or_empty(lse):  # type: ignore[no-untyped-def]
        return tl.where((lse != lse) | (lse == float("inf")), float("-inf"), lse)

    @triton.jit
    def live_splits(length, count, block):  # type: ignore[no-untyped-def]
        """Splits that were written; `partial.Splits` says how tokens are dealt."""
        share = tl.cdiv(tl.cdiv(length, tl.maximum(count, 1)), block) * block
        return tl.cdiv(length, tl.maximum(share, 1)).to(tl.int32)

    @triton.jit(do_not_specialize=["block", "x_b", "x_h", "x_s", "l_b", "l_h", "l_s"])
    def _combine_splits_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        l_ptr,
        indptr_ptr,
        counts_ptr,
        y_ptr,
        y_lse_ptr,
        block,
        scale,
        x_b,
        x_h,
        x_s,
        l_b,
        l_h,
        l_s,
        x_d: tl.constexpr,
        X_UNIT: tl.constexpr,
        HEADS: tl.constexpr,
        D: tl.constexpr,
        SPLITS: tl.constexpr,
        COLS: tl.constexpr,
        LOG2_E: tl.constexpr,
    ):
        row = tl.program_id(0)
        b = (row // HEADS).to(tl.int64)
        h = (row % HEADS).to(tl.int64)
        d = tl.program_id(1) * COLS + tl.arange(0, COLS)
        length = tl.load(indptr_ptr + b + 1) - tl.load(indptr_ptr + b)
        live = live_splits(length, tl.load(counts_ptr + b), block)
        l_at = l_ptr + b * l_b + h * l_h
        x_at = x_ptr + (b * x_b + h * x_h) * X_UNIT + d[None, :] * x_d

        # A few steps over many splits each; in a step no load waits for another.
        top = float("-inf")
        total = 0.0
        y = tl.zeros([COLS], tl.float32)
        for first in tl.range(0, live, SPLITS):
            s = first + tl.arange(0, SPLITS)
            here = s < live
            lse = tl.load(l_at + s.to(tl.int64) * l_s, mask=here, other=float("-inf"))
            x_row = (s.to(tl.int64) * x_s * X_UNIT)[:, None]
            cells = here[:, None] & (d < D)[None, :]
            x = tl.load(x_at + x_row, mask=cells, other=0.0)
            lse = _or_empty(lse)
            x = tl.where((lse == float("-inf"))[:, None], 0.0, x)
            above = tl.maximum(top, tl.max(lse, 0))
            shift = tl.where(above == float("-inf"), 0.0, above)
            weight = tl.exp2((lse - shift) * LOG2_E)
            before = tl.exp2((top - shift) * LOG2_E)
            total = total * before + tl.sum(weight, 0)
            y = y * before + tl.sum(x * weight[:, None], 0)
            top = above
        # The total is at least 1, or 0 where there is no token.
        y *= scale / tl.maximum(total, 1.0)
        y_at = y_ptr + row.to(tl.int64) * D + d
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=d < D)
        tl.store(y_lse_ptr + row, top + tl.log(total), mask=tl.program_id(1) == 0)

    # Batch size and strides vary between calls: none may trigger a compilation.
    @triton.jit(do_not_specialize=["rows", "x_n", "x_b", "x_h", "l_n", "l_b", "l_h", "y_b", "y_h"])
    def _combine_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        l_ptr,
        sink_ptr,
        y_ptr,
        y_lse_ptr,
        rows,
        x_n,
        x_b,
        x_h,
        l_n,
        l_b,
        l_h,
        y_b,
        y_h,
        x_d: tl.constexpr,
        y_d: tl.constexpr,
        X_UNIT: tl.constexpr,
        Y_UNIT: tl.constexpr,
        N: tl.constexpr,
        HEADS: tl.constexpr,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        BASE2: tl.constexpr,
        LOG2_E: tl.constexpr,
        WITH_LSE: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        b = (row // HEADS).to(tl.int64)
        h = (row % HEADS).to(tl.int64)
        d = tl.arange(0, COLS)[None, :]
        row_ok = row < rows
        cell_ok = row_ok[:, None] & (d < D)
        l_row = b * l_b + h * l_h
        x_row = (b * x_b + h * x_h) * X_UNIT

        # All loads come before the first use: none waits for another.
        lse = ()
        x = ()
        for n in tl.static_range(N):
            l_at = l_ptr + (l_row + tl.cast(n, tl.int64) * l_n)
            x_at = x_ptr + (x_row + tl.cast(n, tl.int64) * x_n * X_UNIT)[:, None] + d * x_d
            lse += (tl.load(l_at, mask=row_ok, other=float("-inf")),)  # type: ignore[assignment]
            x += (tl.load(x_at, mask=cell_ok, other=0.0),)  # type: ignore[assignment]

        top = tl.full([ROWS], float("-inf"), tl.float32)
        if sink_ptr is not None:
            sink = tl.load(sink_ptr + h, mask=row_ok, other=float("-inf")).to(tl.float32)
            sink = sink * LOG2_E if BASE2 else sink
            top = sink
        for n in tl.static_range(N):
            top = tl.maximum(top, _or_empty(lse[n]))
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.full([ROWS], 0.0, tl.float32)
        if sink_ptr is not None:  # one more shard, whose output is 0
            total = tl.exp2(sink - top if BASE2 else (sink - top) * LOG2_E)
        y = tl.full([ROWS, COLS], 0.0, tl.float32)
        for n in tl.static_range(N):
            l_n_ok = _or_empty(lse[n])
            weight = tl.exp2(l_n_ok - top if BASE2 else (l_n_ok - top) * LOG2_E)
            total += weight
            part = tl.where((l_n_ok == float("-inf"))[:, None], 0.0, x[n].to(tl.float32))
            y += part * weight[:, None]
        y *= (1.0 / tl.maximum(total, 1.0))[:, None]  # the total is 0 where all shards are empty

        y_row = (b * y_b + h * y_h) * Y_UNIT
        tl.store(y_ptr + y_row[:, None] + d * y_d, y.to(y_ptr.dtype.element_ty), mask=cell_ok)
        if WITH_LSE:
            log = tl.log2(total) if BASE2 else tl.log(total)
            tl.store(y_lse_ptr + row, top + log, mask=row_ok)

    @triton.jit(
        do_not_specialize=[
            *("rows", "first", "count", "a_b", "a_h", "la_b", "la_h"),
            *("b_b", "b_h", "lb_b", "lb_h"),
        ]
    )
    def _merge_kernel(  # type: ignore[no-untyped-def]
        a_ptr,
        la_ptr,
        b_ptr,
        lb_ptr,
        sink_ptr,
        y_ptr,
        y_lse_ptr,
        rows,
        first,
        count,
        a_b,
        a_h,
        la_b,
        la_h,
        b_b,
        b_h,
        lb_b,
        lb_h,
        a_d: tl.constexpr,
        b_d: tl.constexpr,
        A_UNIT: tl.constexpr,
        B_UNIT: tl.constexpr,
        HEADS: tl.constexpr,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        BASE2: tl.constexpr,
        LOG2_E: tl.constexpr,
        WITH_LSE: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        t = (row // HEADS).to(tl.int64)
        h = (row % HEADS).to(tl.int64)
        d = tl.arange(0, COLS)[None, :]
        row_ok = row < rows
        u = t - first
        part_ok = row_ok & (u >= 0) & (u < count)

        a_at = a_ptr + ((t * a_b + h * a_h) * A_UNIT)[:, None] + d * a_d
        a = tl.load(a_at, mask=row_ok[:, None] & (d < D), other=0.0)
        b_at = b_ptr + ((u * b_b + h * b_h) * B_UNIT)[:, None] + d * b_d
        b = tl.load(b_at, mask=part_ok[:, None] & (d < D), other=0.0)
        la = _or_empty(tl.load(la_ptr + t * la_b + h * la_h, mask=row_ok, other=float("-inf")))
        lb = _or_empty(tl.load(lb_ptr + u * lb_b + h * lb_h, mask=part_ok, other=float("-inf")))

        top = tl.maximum(la, lb)
        if sink_ptr is not None:
            sink = tl.load(sink_ptr + h, mask=row_ok, other=float("-inf")).to(tl.float32)
            sink = sink * LOG2_E if BASE2 else sink
            top = tl.maximum(top, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        a_weight = tl.exp2(la - top if BASE2 else (la - top) * LOG2_E)
        b_weight = tl.exp2(lb - top if BASE2 else (lb - top) * LOG2_E)
        total = a_weight + b_weight
        if sink_ptr is not None:
            total += tl.exp2(sink - top if BASE2 else (sink - top) * LOG2_E)
        y = tl.where((la == float("-inf"))[:, None], 0.0, a.to(tl.float32)) * a_weight[:, None]
        y += tl.where((lb == float("-inf"))[:, None], 0.0, b.to(tl.float32)) * b_weight[:, None]
        y *= (1.0 / tl.maximum(total, 1.0))[:, None]
        y_at = y_ptr + row.to(tl.int64)[:, None] * D + d
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & (d < D))
        if WITH_LSE:
            log = tl.log2(total) if BASE2 else tl.log(total)
            tl.store(y_lse_ptr + row, top + log, mask=row_ok)

    @triton.jit(do_not_specialize=["rank", "rows", "x_b", "x_h", "l_n", "l_b", "l_h"])
    def _rescale_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        l_ptr,
        y_ptr,
        y_lse_ptr,
        rank,
        rows,
        x_b,
        x_h,
        l_n,
        l_b,
        l_h,
        x_d: tl.constexpr,
        X_UNIT: tl.constexpr,
        N: tl.constexpr,
        HEADS: tl.constexpr,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        BASE2: tl.constexpr,
        LOG2_E: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        b = (row // HEADS).to(tl.int64)
        h = (row % HEADS).to(tl.int64)
        cols = tl.arange(0, COLS)[None, :]
        row_ok = row < rows
        l_row = b * l_b + h * l_h
        x_row = (b * x_b + h * x_h) * X_UNIT

        # As in `_combine_kernel`, all loads come before the first use.
        x = ()
        for start in tl.static_range(0, D, COLS):
            d = start + cols
            cell_ok = row_ok[:, None] & (d < D)
            x_at = x_ptr + x_row[:, None] + d * x_d
            x += (tl.load(x_at, mask=cell_ok, other=0.0),)  # type: ignore[assignment]
        lse = ()
        for n in tl.static_range(N):
            l_at = l_ptr + (l_row + tl.cast(n, tl.int64) * l_n)
            lse += (tl.load(l_at, mask=row_ok, other=float("-inf")),)  # type: ignore[assignment]

        top = tl.full([ROWS], float("-inf"), tl.float32)
        own = top
        for n in tl.static_range(N):
            top = tl.maximum(top, _or_empty(lse[n]))
            own = tl.where(rank == n, _or_empty(lse[n]), own)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.full([ROWS], 0.0, tl.float32)
        for n in tl.static_range(N):
            above = _or_empty(lse[n]) - top
            total += tl.exp2(above if BASE2 else above * LOG2_E)
        share = tl.exp2(own - top if BASE2 else (own - top) * LOG2_E) / tl.maximum(total, 1.0)

        y_row = (h * (rows // HEADS) + b) * D
        for start in tl.static_range(0, D, COLS):
            d = start + cols
            part = tl.where((own == float("-inf"))[:, None], 0.0, x[start // COLS].to(tl.float32))
            y_at = y_ptr + y_row[:, None] + d
            tl.store(y_at, part * share[:, None], mask=row_ok[:, None] & (d < D))
        log = tl.log2(total) if BASE2 else tl.log(total)
        tl.store(y_lse_ptr + row, top + log, mask=row_ok)

    @triton.jit(do_not_specialize=["rows", "x_b", "x_h", "l_b", "l_h"])
    def _pack_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        l_ptr,
        send_ptr,
        rows,
        x_b,
        x_h,
        l_b,
        l_h,
        x_d: tl.constexpr,
        X_UNIT: tl.constexpr,
        PITCH: tl.constexpr,
        LSE_PITCH: tl.constexpr,
        LSE_AT: tl.constexpr,
        HEADS: tl.constexpr,
        OWNED: tl.constexpr,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        b = (row // HEADS).to(tl.int64)
        h = (row % HEADS).to(tl.int64)
        d = tl.arange(0, COLS)[None, :]
        t = tl.arange(0, 4)[None, :]
        row_ok = (row < rows)[:, None]
        cell_ok = row_ok & (d < D)

        x = tl.load(x_ptr + ((b * x_b + h * x_h) * X_UNIT)[:, None] + d * x_d, mask=cell_ok)
        l_at = l_ptr + (b * l_b + h * l_h)[:, None]
        tail = tl.load(l_at + t * 0, mask=row_ok & (t == 0), other=0.0)

        packed = ((h // OWNED * (rows // HEADS) + b) * OWNED + h % OWNED)[:, None]
        row_at = send_ptr.to(tl.pointer_type(x_ptr.dtype.element_ty)) + packed * PITCH
        tl.store(row_at + d, x, mask=cell_ok)
        # The whole tail, not the LSE alone: memory that is written in parts must first be read.
        tail_at = send_ptr.to(tl.pointer_type(tl.float32)) + packed * LSE_PITCH + LSE_AT
        tl.store(tail_at + t, _or_empty(tail), mask=row_ok)


def _combine_triton(
    partials: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
    base2: bool,
    sinks: torch.Tensor | None,
) -> None:
    N, B, h, D = partials.shape
    x, y = _Strides(partials), _Strides(out)
    # More shards take smaller vectors, so that a thread has registers for all loads at once.
    tile = _tile(B * h, D, partials.element_size(), vector=16 if N <= 2 else 8)
    _combine_kernel[tile.grid](
        partials,
        lse,
        sinks,
        out,
        out_lse,
        B * h,
        *x.outer,
        *lse.stride(),
        *y.outer,
        x_d=x.last,
        y_d=y.last,
        X_UNIT=x.unit,
        Y_UNIT=y.unit,
        N=N,
        HEADS=h,
        D=D,
        ROWS=tile.rows,
        COLS=tile.cols,
        BASE2=base2,
        LOG2_E=_LOG2_E,
        WITH_LSE=out_lse is not None,
        num_warps=tile.warps,
        **_loads_first(N),
    )


def _merge_triton(
    whole: tuple[torch.Tensor, torch.Tensor],
    part: tuple[torch.Tensor, torch.Tensor],
    first: int,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
    base2: bool,
    sinks: torch.Tensor | None,
) -> None:
    B, h, D = out.shape
    a, b = _Strides(whole[0]), _Strides(part[0])
    tile = _tile(B * h, D, out.element_size(), vector=16)
    _merge_kernel[tile.grid](
        *whole,
        *part,
        sinks,
        out,
        out_lse,
        B * h,
        first,
        len(part[0]),
        *a.outer,
        *whole[1].stride(),
        *b.outer,
        *part[1].stride(),
        a_d=a.last,
        b_d=b.last,
        A_UNIT=a.unit,
        B_UNIT=b.unit,
        HEADS=h,
        D=D,
        ROWS=tile.rows,
        COLS=tile.cols,
        BASE2=base2,
        LOG2_E=_LOG2_E,
        WITH_LSE=out_lse is not None,
        num_warps=tile.warps,
        **_loads_first(2),
    )


def _combine_splits_triton(
    partials: torch.Tensor,
    lse: torch.Tensor,
    indptr: torch.Tensor,
    counts: torch.Tensor,
    block: int,
    scale: float,
    out: torch.Tensor,
    out_lse: torch.Tensor,
) -> None:
    B, H, S, D = partials.shape
    x = _Strides(partials)
    splits, cols, warps = _splits_tile(S, D)
    _combine_splits_kernel[(B * H, -(-D // cols))](
        partials,
        lse,
        indptr,
        counts,
        out,
        out_lse,
        block,
        scale,
        *x.outer,
        *lse.stride(),
        x_d=x.last,
        X_UNIT=x.unit,
        HEADS=H,
        D=D,
        SPLITS=splits,
        COLS=cols,
        LOG2_E=_LOG2_E,
        num_warps=warps,
    )


def _splits_tile(S: int, D: int) -> tuple[int, int, int]:
    """Splits and columns that a program takes in a step, and its warps.

    As many splits as it has registers for, in lines of at least 128 bytes. Where there are many
    splits there are few rows, and programs share the columns of each.
    """
    splits = min(_power_of_2(S), 256)
    cols = min(_power_of_2(D), max(32, 4096 // splits))
    return splits, cols, min(8, max(1, splits * cols // 1024))


def _rescale_triton(
    out: torch.Tensor,
    lses: torch.Tensor,
    rank: int,
    scaled: torch.Tensor,
    total: torch.Tensor,
    base2: bool,
) -> None:
    B, H, D = out.shape
    N = len(lses)
    x = _Strides(out)
    # A thread takes four elements of fp32, a vector of 16 bytes, from each quarter of a row. Every
    # thread of a row works out the row's share, so there are few; and wider tiles than vectors
    # Triton would load and store in two layouts, with shared memory between them.
    cols = _power_of_2(-(-D // 4))
    tile = _tile(B * H, cols, out.element_size(), vector=4 * out.element_size())
    _rescale_kernel[tile.grid](
        out,
        lses,
        scaled,
        total,
        rank,
        B * H,
        *x.outer,
        *lses.stride(),
        x_d=x.last,
        X_UNIT=x.unit,
        N=N,
        HEADS=H,
        D=D,
        ROWS=tile.rows,
        COLS=tile.cols,
        BASE2=base2,
        LOG2_E=_LOG2_E,
        num_warps=tile.warps,
        **_loads_first(N),
    )


def _pack_triton(out: torch.Tensor, lse: torch.Tensor, send: torch.Tensor) -> None:
    B, H, D = out.shape
    row = send.shape[-1]
    x = _Strides(out)
    tile = _tile(B * H, D, out.element_size(), vector=16)
    _pack_kernel[tile.grid](
        out,
        lse,
        send,  # once: of two views into one buffer torch.compile would keep only one's writes
        B * H,
        *x.outer,
        *lse.stride(),
        x_d=x.last,
        X_UNIT=x.unit,
        PITCH=row // out.element_size(),
        LSE_PITCH=row // 4,
        LSE_AT=(row - _TAIL) // 4,
        HEADS=H,
        OWNED=send.shape[2],
        D=D,
        ROWS=tile.rows,
        COLS=tile.cols,
        num_warps=tile.warps,
    )


class _Strides:
    """Strides as the kernels take them: those of rows in units of up to 16 bytes.

    Triton vectorises an access only as far as it can prove alignment. It could learn that from the
    values of the strides and compile again for others; the unit is a constant that says as much.
    """

    def __init__(self, x: torch.Tensor):
        *outer, self.last = x.stride()
        self.unit = 16 // x.element_size()
        while any(stride % self.unit for stride in outer):
            self.unit //= 2
        self.outer = [stride // self.unit for stride in outer]


class _Tile(NamedTuple):
    grid: tuple[int]
    rows: int
    cols: int
    warps: int


def _tile(rows: int, D: int, itemsize: int, vector: int) -> _Tile:
    """Programs of 128 threads; each thread takes one vector (bytes) of a shard's row."""
    cols = _power_of_2(D)
    threads = max(1, cols * itemsize // vector)
    per_program = max(1, 128 // threads)
    warps = min(8, max(1, per_program * threads // 32))
    return _Tile((-(-rows // per_program),), per_program, cols, warps)


def _loads_first(N: int) -> dict[str, int]:
    """Option for ptxas, which else saves registers and puts loads off until their values are used.

    Given room it issues them together. 64 registers suffice for 16 shards without spilling, and a
    multiprocessor still holds 1024 threads. HIP and torch.compile lack the option.
    """
    lacking = torch.version.hip or torch.compiler.is_compiling()
    return {} if lacking or N > 16 else {"maxnreg": 64}


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _check_combine(
    partials: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    sinks: torch.Tensor | None,
) -> None:
    if partials.ndim != 4 or partials.shape[0] == 0:
        raise ValueError(f"partials must be [N, B, h, D] with N >= 1, got {list(partials.shape)}")
    if partials.dtype not in _PAYLOADS:
        raise TypeError(f"partials must be bf16, fp16 or fp32, got {partials.dtype}; convert first")
    _check_lse(lse, partials.shape[:-1], partials, "partials")
    if out is not None:
        if out.shape != partials.shape[1:]:
            raise ValueError(
                f"out must be [B, h, D] = {list(partials.shape[1:])} to hold the combination of "
                f"partials {list(partials.shape)}, got {list(out.shape)}"
            )
        if out.device != partials.device:
            raise ValueError(f"out is on {out.device} and partials on {partials.device}")
        if out_dtype not in (None, out.dtype):
            raise TypeError(f"out_dtype is {out_dtype} but out is {out.dtype}; give one of them")
        out_dtype = out.dtype
    if out_dtype not in (None, *_PAYLOADS):
        raise TypeError(f"the result must be bf16, fp16 or fp32, got {out_dtype}")
    if sinks is not None:
        if sinks.shape != partials.shape[2:3] or not sinks.is_contiguous():
            raise ValueError(
                f"sinks must be contiguous [{partials.shape[2]}], one of each head, got "
                f"{list(sinks.shape)}"
            )
        if sinks.device != partials.device:
            raise ValueError(f"sinks are on {sinks.device} and partials on {partials.device}")


def _check_merge(
    whole: tuple[torch.Tensor, torch.Tensor],
    part: tuple[torch.Tensor, torch.Tensor],
    first: int,
    out_dtype: torch.dtype,
    sinks: torch.Tensor | None,
) -> None:
    for name, (out, lse) in (("whole", whole), ("part", part)):
        _check_combine(out[None], lse[None], None, out_dtype, sinks)
        if out.shape[1:] != whole[0].shape[1:] or out.device != whole[0].device:
            raise ValueError(
                f"{name} is {list(out.shape)} on {out.device} beside {list(whole[0].shape)} on "
                f"{whole[0].device}"
            )
    if not 0 <= first <= len(whole[0]) - len(part[0]):
        raise ValueError(f"{len(part[0])} queries from {first} on are not in {len(whole[0])}")


def _check_rescale(out: torch.Tensor, lses: torch.Tensor, rank: int) -> None:
    if out.ndim != 3:
        raise ValueError(f"out must be [B, H, D], got {list(out.shape)}")
    if out.dtype not in _PAYLOADS:
        raise TypeError(f"out must be bf16, fp16 or fp32, got {out.dtype}; convert first")
    _check_lse(lses, torch.Size((*lses.shape[:1], *out.shape[:-1])), out, "out")
    if not 0 <= rank < len(lses):
        raise ValueError(f"rank is {rank} but lses {list(lses.shape)} are of {len(lses)} ranks")


def _check_pack(
    out: torch.Tensor, lse: torch.Tensor, num_ranks: int, send: torch.Tensor | None
) -> None:
    if out.ndim != 3:
        raise ValueError(f"out must be [B, H, D], got {list(out.shape)}")
    if out.element_size() not in _BITS:
        raise TypeError(f"out must have elements of 1, 2 or 4 bytes, got {out.dtype}")
    B, H, D = out.shape
    if num_ranks < 1 or H % num_ranks:
        raise ValueError(
            f"{H} heads of out {list(out.shape)} do not divide among {num_ranks} ranks"
        )
    _check_lse(lse, out.shape[:-1], out, "out")
    if send is not None:
        _check_packed("send", send, D, out.dtype)
        if send.shape[:3] != (num_ranks, B, H // num_ranks):
            raise ValueError(
                f"send must be [N, B, H/N, row bytes] = {[num_ranks, B, H // num_ranks]} + "
                f"[{send.shape[3]}] for out {list(out.shape)}, got {list(send.shape)}"
            )
        if send.device != out.device:
            raise ValueError(f"send is on {send.device} and out on {out.device}")


def _check_splits(
    partials: torch.Tensor,
    lse: torch.Tensor,
    indptr: torch.Tensor,
    counts: torch.Tensor,
    out_dtype: torch.dtype,
) -> None:
    if partials.ndim != 4:
        raise ValueError(f"partials must be [B, H, S, D], got {list(partials.shape)}")
    if partials.dtype != torch.float32 or out_dtype not in _PAYLOADS:
        raise TypeError(
            f"splits must be fp32 and their result bf16, fp16 or fp32, got {partials.dtype} and "
            f"{out_dtype}"
        )
    _check_lse(lse, partials.shape[:-1], partials, "partials")
    if len(indptr) <= len(lse) or len(counts) < len(lse):
        raise ValueError(
            f"splits of {len(lse)} sequences need as many counts and one more in indptr, got "
            f"{len(counts)} and {len(indptr)}"
        )


def _check_lse(lse: torch.Tensor, shape: torch.Size, of: torch.Tensor, name: str) -> None:
    if lse.shape != shape:
        raise ValueError(
            f"lse must be {list(shape)} beside {name} {list(of.shape)}, got {list(lse.shape)}"
        )
    if lse.dtype != torch.float32:
        raise TypeError(f"lse must be fp32, got {lse.dtype}")
    if lse.device != of.device:
        raise ValueError(f"lse is on {lse.device} and {name} on {of.device}")


def _check_packed(name: str, rows: torch.Tensor, D: int, dtype: torch.dtype) -> None:
    if rows.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {rows.dtype}")
    row = packed_row_bytes(D, dtype)
    if rows.ndim != 4 or rows.shape[3] != row:
        raise ValueError(
            f"{name} must be [N, B, h, {row}]: rows of {D} {dtype} and their LSE take {row} bytes, "
            f"got {list(rows.shape)}"
        )
    if not rows.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {rows.stride()}")
