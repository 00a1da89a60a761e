"""What `lse_combine` does, as Triton kernels; `lse_weights` is the rule that all of them follow.

The functions take what `lse_combine`'s of the same names have checked, and write to `out`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_helix.srt.layers.dcp.lse_weights import (
    counted,
    live_splits,
    lse_of,
    merged,
    shift_of,
    sink_of,
    weight_of,
)
from sglang_helix.srt.layers.dcp.packed_rows import TAIL_BYTES
from sglang_helix.srt.layers.dcp.partial import Partial, Splits


@triton.jit(do_not_specialize=["block", "x_b", "x_h", "x_s", "l_b", "l_h", "l_s"])
def _combine_splits_kernel(
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
        lse = counted(lse)
        x = tl.where((lse == float("-inf"))[:, None], 0.0, x)
        above = tl.maximum(top, tl.max(lse, 0))
        shift = shift_of(above)
        weight = weight_of(lse, shift, False)
        before = weight_of(top, shift, False)
        total = total * before + tl.sum(weight, 0)
        y = y * before + tl.sum(x * weight[:, None], 0)
        top = above
    y *= scale / tl.maximum(total, 1.0)
    y_at = y_ptr + row.to(tl.int64) * D + d
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=d < D)
    tl.store(y_lse_ptr + row, lse_of(total, top, False), mask=tl.program_id(1) == 0)


# Batch size and strides vary between calls: none may trigger a compilation.
@triton.jit(do_not_specialize=["rows", "x_n", "x_b", "x_h", "l_n", "l_b", "l_h", "y_b", "y_h"])
def _combine_kernel(
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
    sink = None
    if sink_ptr is not None:
        sink = sink_of(tl.load(sink_ptr + h, mask=row_ok, other=float("-inf")), BASE2)
    y, total = merged(lse, x, sink, BASE2)

    y_row = (b * y_b + h * y_h) * Y_UNIT
    tl.store(y_ptr + y_row[:, None] + d * y_d, y.to(y_ptr.dtype.element_ty), mask=cell_ok)
    if WITH_LSE:
        tl.store(y_lse_ptr + row, total, mask=row_ok)


@triton.jit(
    do_not_specialize=[
        *("rows", "first", "count", "a_b", "a_h", "la_b", "la_h"),
        *("b_b", "b_h", "lb_b", "lb_h"),
    ]
)
def _merge_kernel(
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
    la = tl.load(la_ptr + t * la_b + h * la_h, mask=row_ok, other=float("-inf"))
    lb = tl.load(lb_ptr + u * lb_b + h * lb_h, mask=part_ok, other=float("-inf"))
    sink = None
    if sink_ptr is not None:
        sink = sink_of(tl.load(sink_ptr + h, mask=row_ok, other=float("-inf")), BASE2)
    y, total = merged((la, lb), (a, b), sink, BASE2)

    y_at = y_ptr + row.to(tl.int64)[:, None] * D + d
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & (d < D))
    if WITH_LSE:
        tl.store(y_lse_ptr + row, total, mask=row_ok)


@triton.jit(do_not_specialize=["rank", "rows", "x_b", "x_h", "l_n", "l_b", "l_h"])
def _rescale_kernel(
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
        top = tl.maximum(top, counted(lse[n]))
        own = tl.where(rank == n, counted(lse[n]), own)
    shift = shift_of(top)
    total = tl.full([ROWS], 0.0, tl.float32)
    for n in tl.static_range(N):
        total += weight_of(counted(lse[n]), shift, BASE2)
    share = weight_of(own, shift, BASE2) / tl.maximum(total, 1.0)

    y_row = (h * (rows // HEADS) + b) * D
    for start in tl.static_range(0, D, COLS):
        d = start + cols
        part = tl.where((own == float("-inf"))[:, None], 0.0, x[start // COLS].to(tl.float32))
        y_at = y_ptr + y_row[:, None] + d
        tl.store(y_at, part * share[:, None], mask=row_ok[:, None] & (d < D))
    tl.store(y_lse_ptr + row, lse_of(total, shift, BASE2), mask=row_ok)


@triton.jit(do_not_specialize=["rows", "x_b", "x_h", "l_b", "l_h"])
def _pack_kernel(
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
    tl.store(tail_at + t, counted(tail), mask=row_ok)


def combine(
    partials: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
    base2: bool,
    sinks: torch.Tensor | None,
) -> None:
    """Partials [N, B, h, D] and lse [N, B, h] into out [B, h, D] and out_lse [B, h]."""
    N, B, h, D = partials.shape
    x, y = _Strides(partials), _Strides(out)
    # More shards take smaller vectors, so that a thread has registers for all loads at once.
    tile = _tile(B * h, D, partials.element_size(), vector=16 if N <= 2 else 8)
    _combine_kernel[tile.grid](
        *(partials, lse, sinks, out, out_lse),
        B * h,
        *(*x.outer, *lse.stride(), *y.outer),
        x_d=x.last,
        y_d=y.last,
        X_UNIT=x.unit,
        Y_UNIT=y.unit,
        N=N,
        HEADS=h,
        D=D,
        BASE2=base2,
        WITH_LSE=out_lse is not None,
        **tile.options,
        **_loads_first(N),
    )


def merge(
    whole: Partial,
    part: Partial,
    first: int,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
    base2: bool,
    sinks: torch.Tensor | None,
) -> None:
    """Two partials, the second of queries from `first` on, into out and out_lse."""
    B, h, D = out.shape
    a, b = _Strides(whole.out), _Strides(part.out)
    tile = _tile(B * h, D, out.element_size(), vector=16)
    _merge_kernel[tile.grid](
        *(*whole, *part, sinks, out, out_lse),
        *(B * h, first, len(part.out)),
        *(*a.outer, *whole.lse.stride(), *b.outer, *part.lse.stride()),
        a_d=a.last,
        b_d=b.last,
        A_UNIT=a.unit,
        B_UNIT=b.unit,
        HEADS=h,
        D=D,
        BASE2=base2,
        WITH_LSE=out_lse is not None,
        **tile.options,
        **_loads_first(2),
    )


def combine_splits(splits: Splits, out: torch.Tensor, out_lse: torch.Tensor) -> None:
    """The splits of B sequences into out [B, H, D] and out_lse [B, H]."""
    B, H, S, D = splits.out.shape
    x = _Strides(splits.out)
    step, cols, warps = _splits_tile(S, D)
    _combine_splits_kernel[(B * H, -(-D // cols))](
        *(splits.out, splits.lse, splits.indptr, splits.counts, out, out_lse),
        *(splits.block, splits.v_scale),
        *(*x.outer, *splits.lse.stride()),
        x_d=x.last,
        X_UNIT=x.unit,
        HEADS=H,
        D=D,
        SPLITS=step,
        COLS=cols,
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


def rescale(
    out: torch.Tensor,
    lses: torch.Tensor,
    rank: int,
    scaled: torch.Tensor,
    total: torch.Tensor,
    base2: bool,
) -> None:
    """Out [B, H, D] by the share of lses[rank] into scaled [H, B, D], and LSEs into total."""
    B, H, D = out.shape
    N = len(lses)
    x = _Strides(out)
    # A thread takes four elements of fp32, a vector of 16 bytes, from each quarter of a row. Every
    # thread of a row works out the row's share, so there are few; and wider tiles than vectors
    # Triton would load and store in two layouts, with shared memory between them.
    tile = _tile(B * H, _power_of_2(-(-D // 4)), out.element_size(), 4 * out.element_size())
    _rescale_kernel[tile.grid](
        *(out, lses, scaled, total),
        *(rank, B * H),
        *(*x.outer, *lses.stride()),
        x_d=x.last,
        X_UNIT=x.unit,
        N=N,
        HEADS=H,
        D=D,
        BASE2=base2,
        **tile.options,
        **_loads_first(N),
    )


def pack(out: torch.Tensor, lse: torch.Tensor, send: torch.Tensor) -> None:
    """Out [B, H, D] and lse [B, H] into rows by owner, send [N, B, H/N, row bytes]."""
    B, H, D = out.shape
    row = send.shape[-1]
    x = _Strides(out)
    tile = _tile(B * H, D, out.element_size(), vector=16)
    _pack_kernel[tile.grid](
        *(out, lse, send),  # once: of two views into one buffer torch.compile would keep one's
        B * H,
        *(*x.outer, *lse.stride()),
        x_d=x.last,
        X_UNIT=x.unit,
        PITCH=row // out.element_size(),
        LSE_PITCH=row // 4,
        LSE_AT=(row - TAIL_BYTES) // 4,
        HEADS=H,
        OWNED=send.shape[2],
        D=D,
        **tile.options,
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

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        return {"ROWS": self.rows, "COLS": self.cols, "num_warps": self.warps}


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
