"""Partial attention to combined heads in one kernel over symmetric memory, and queries to all.

Every rank of a KVP group of N ranks holds a partial output of all H heads. The kernel writes each
head's row and LSE straight into the workspace of the rank that owns the head, waits for the rows
of its own heads, combines them (`lse_combine` states the contract and the formula) and writes the
result. Rank j owns heads [j*h, (j+1)*h) with h = ceil(H/N).

The protocol. A row is a token, a place among the owned heads and one of a few equal parts of D.
Each row is an N-rank collective of its own, carried by one program on every rank: it sends one
piece to each rank, itself included, and receives one from each. Rows do not wait for each other,
so there is no barrier over programs or ranks.

Pieces lie in the receiver's memory, which holds a value that is never sent wherever nothing has
arrived. The receiver polls the pieces themselves, then puts the value back. No fence, no flag: one
trip over the link, for twice the local writes. (Two protocols with a fence and a flag for each
piece were measured beside it, and were slower at every size: docs/figures/collectives-h100.csv.)

Two slots. A row's pieces of call k use slot k % 2. A rank sends the row's call k + 2
after finishing call k + 1, for which it needed a piece of every rank's call k + 1, and each rank
sent that after its kernel of call k had ended: all that stood in the slot was read, and the value
put back. One slot would not do; test/srt/layers/dcp/symm_model.py checks both. The argument needs
a piece from every rank in every call: where h*N > H the places that stand for no head travel too,
as empty shards.

Ahead by one row (`Layout.ahead`): a program of several rows sends one before it waits for the one
before, not all of them first, so that link and local memory work at once. Of the rows that some
rank has not received all ranks have sent the first, so that somebody gets on wherever all programs
are resident, or start in order.

Epochs. Each row counts its calls in the rank's own memory. No host state, so CUDA graphs replay;
no reset, so batch sizes may vary.

Residency. A program that waits keeps its place on the device. Where programs start in the order of
their numbers, as devices do and CUDA does not promise, fewer may fit than there are: whoever waits
for a row waits for one of the lowest that are left, and these have started on every rank. Where
ranks started them in other orders, all would have to fit (the model checks both); so a launch is
never larger than what fits.

The gather of queries (`gather_kernel`) goes by the same protocol: a row is a token and a place
among a rank's own heads, and the piece that a rank sends is the same for all. What has arrived is
stored where attention reads it, in the order of the heads, before the value is put back. Every bit
arrives as it was, but for a word of ones, a NaN, which is sent as the NaN below it.

What the caller owes: every rank makes the same calls (batch size, order), and calls on one
workspace never overlap in time: one workspace per stream that runs concurrently with others. And a
call may fill the device, so nothing that peers wait for may run beside it, such as NCCL elsewhere.

Memory order. `.wt` stores compile to STG.STRONG.SYS and volatile loads to LDG.STRONG.SYS, the
instructions of PTX's relaxed.sys accesses (test_symm_compile.py looks). Words are 4 bytes and
never tear; nothing is assumed of wider accesses. Between two calls the kernel boundary orders.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import os

import triton
import triton.language as tl

from sglang_helix.srt.layers.dcp.lse_weights import (
    live_splits,
    lse_of,
    shift_of,
    sink_of,
    weight_of,
)
from sglang_helix.srt.layers.dcp.symm_layout import power_of_2

SEND, RECEIVE = 1, 2  # phases of the kernel; apart only where ranks run one after another (tests)

# A NaN, in fp32 and in both halves of two fp16 or bf16; sent as the NaN below it. LSEs sent are
# never NaN.
_NEVER_SENT: tl.constexpr = tl.constexpr(0xFFFFFFFF)
_NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))
_INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_POLLS_PER_REPORT: tl.constexpr = tl.constexpr(1 << 12)  # some milliseconds


@triton.jit
def _any_thread(flag):
    """Whether any thread of the program says so: one answer for all.

    Threads that hold the same element load it each for themselves, and from memory that changes
    they may load different values; a loop must still end for all of them at once.
    """
    if not _INTERPRETED:
        flag = tl.inline_asm_elementwise(
            "{ .reg .pred p, q; setp.ne.s32 p, $1, 0;"
            "bar.red.or.pred q, 0, p; selp.s32 $0, 1, 0, q; }",
            "=r,r",
            [flag.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    return flag != 0


@triton.jit
def _floats(words, dtype: tl.constexpr):
    """uint32 [n, w] -> the elements that its words hold, fp32 [n, w * elements per word]."""
    if dtype == tl.float32:
        values = words.to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)
        values = tl.interleave(low, high)
    return values


@triton.jit
def _words(values, dtype: tl.constexpr, n: tl.constexpr, w: tl.constexpr):
    """fp32 [n, w * elements per word] -> uint32 [n, w], rounded to dtype: inverse of `_floats`."""
    if dtype == tl.float32:
        words = values.to(tl.uint32, bitcast=True)
    else:
        low, high = tl.split(tl.reshape(values, [n, w, 2]))
        low = low.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = high.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        words = low | (high << 16)
    return words


@triton.jit
def _merge_splits(rows, row_step, lses, lse_step, splits, here, d, D: tl.constexpr):
    """Combine the first splits of n heads of a sequence: fp32 [n, d] and LSE [n].

    The maximum comes first, so that the loads of rows need not wait for one another.
    """
    top = tl.full(here.shape, _NEG_INF, tl.float32)
    for s in tl.range(splits):
        lse = tl.load(lses + s * lse_step, mask=here, other=_NEG_INF)
        top = tl.maximum(top, tl.where(tl.abs(lse) < float("inf"), lse, _NEG_INF))
    shift = shift_of(top)
    total = tl.zeros(here.shape, tl.float32)
    merged = tl.zeros([here.shape[0], d.shape[0]], tl.float32)
    for s in tl.range(splits):
        lse = tl.load(lses + s * lse_step, mask=here, other=_NEG_INF)
        some = tl.abs(lse) < float("inf")
        weight = tl.where(some, weight_of(lse, shift, False), 0.0)
        cells = some[:, None] & (d < D)[None, :]
        x = tl.load((rows + s * row_step)[:, None] + d[None, :], mask=cells, other=0.0)
        total += weight
        merged += x * weight[:, None]
    return merged / tl.maximum(total, 1.0)[:, None], lse_of(total, shift, False)


@triton.jit
def _row(first_token, row, OWNED: tl.constexpr, PARTS: tl.constexpr):
    """Token, place among the owned heads, and part of a row."""
    return first_token + row // (OWNED * PARTS), row // PARTS % OWNED, row % PARTS


@triton.jit
def _rows(home, offset, slot_row, number, w, N: tl.constexpr, W: tl.constexpr):
    """Addresses of pieces of W words; the hint lets the compiler use 16-byte accesses."""
    first = (home + offset).to(tl.pointer_type(tl.uint32)) + (slot_row * N + number) * W
    return tl.multiple_of(first[:, None], (16, 16)) + w[None, :]


@triton.jit
def _line(home, offset, slot_row, number, LINE: tl.constexpr):
    """Addresses of the LSEs that go with the pieces of a row."""
    return (home + offset).to(tl.pointer_type(tl.uint32)) + (slot_row * LINE + number)


@triton.jit
def _report(status, missing, n, epoch, layer):
    """Tell the host what this program waits for; `symm_workspace.Stall` reads it.

    The last rank that is missing is named by its number plus one; 0 means that rows are there in
    part.
    """
    last = tl.max(tl.where(missing, n + 1, 0), 0)
    word = (epoch << 32) | (layer.to(tl.int64) << 16) | last
    tl.store(status, word, cache_modifier=".wt")


# Nothing that varies between calls may trigger a compilation.
@triton.jit(
    do_not_specialize=[
        *("rank", "tokens", "layer", "x_b", "x_h", "x_s", "l_b", "l_h", "l_s", "y_b", "y_h"),
        *("yl_b", "yl_h", "block"),
    ]
)
def exchange_kernel(
    x_ptr,  # partial rows, or Splits.out
    l_ptr,
    peers_ptr,  # int64 [N]: address of each rank's workspace
    epochs_ptr,
    y_ptr,
    y_lse_ptr,
    sink_ptr,
    status_ptr,
    indptr_ptr,
    counts_ptr,
    empty_ptr,  # bool [tokens]; None where the LSEs of rows say it
    rank,
    tokens,
    layer,
    x_b,  # strides of rows in 16-byte vectors, all others in elements
    x_h,
    x_s,
    l_b,
    l_h,
    l_s,
    y_b,
    y_h,
    yl_b,
    yl_h,
    block,
    v_scale,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    OWNED: tl.constexpr,
    PARTS: tl.constexpr,
    D: tl.constexpr,  # of a row: a part of a head
    WIRE: tl.constexpr,
    ROWS: tl.constexpr,
    LINE: tl.constexpr,
    DATA: tl.constexpr,
    LSES: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BASE2: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Send, wait, combine; `exchange` fills in the arguments.

    Grid (programs, ranks in this launch). The second axis is 1 except where one device plays all
    ranks; batches of these ranks stand one behind the other in all tensors.
    """
    W: tl.constexpr = D * WIRE.primitive_bitwidth // 32
    NP: tl.constexpr = power_of_2(N)
    WP: tl.constexpr = power_of_2(W)
    DP: tl.constexpr = WP * 32 // WIRE.primitive_bitwidth
    me = rank + tl.program_id(1)
    first_token = tl.program_id(1).to(tl.int64) * tokens
    n = tl.arange(0, NP)
    w = tl.arange(0, WP)
    d = tl.arange(0, DP)
    live = n < N
    cells = live[:, None] & (w < W)[None, :]
    base = tl.load(peers_ptr + n, mask=live, other=0)
    own = tl.load(peers_ptr + me)
    epochs = epochs_ptr + tl.program_id(1) * ROWS
    first_row = tl.program_id(0)
    first_epoch = tl.load(epochs + first_row)  # for a program that has one row, the only load

    # A turn sends the row after the one that it receives, the first turn both. Or, without turns,
    # all sends come before the first wait.
    TURNS: tl.constexpr = AHEAD and PHASE == 3 and not SPLITS
    rows_here, step = tokens * OWNED * PARTS, tl.num_programs(0)
    turns = tl.cdiv(rows_here - first_row, step) if TURNS else 1
    for turn in tl.range(turns):
        if PHASE & 1:
            start, end = first_row, rows_here
            if TURNS:
                start += (turn + (turn > 0)) * step
                end = tl.minimum(rows_here, first_row + (turn + 2) * step)
            for row in tl.range(start, end, step):
                b, h, part = _row(first_token, row, OWNED, PARTS)
                head = n * OWNED + h
                here = live & (head < HEADS)
                l_row = b * l_b + head.to(tl.int64) * l_h
                if SPLITS:
                    x_row = (b * x_b + head.to(tl.int64) * x_h) * 4 + part * D
                    length = tl.load(indptr_ptr + b + 1) - tl.load(indptr_ptr + b)
                    splits, at = live_splits(length, tl.load(counts_ptr + b), block), x_ptr + x_row
                    values, lse = _merge_splits(
                        at, x_s.to(tl.int64) * 4, l_ptr + l_row, l_s, splits, here, d, D
                    )
                    x = _words(values * v_scale, WIRE, NP, WP)
                else:
                    x_row = (b * x_b + head.to(tl.int64) * x_h) * 4 + part * W
                    at = x_ptr.to(tl.pointer_type(tl.uint32)) + x_row[:, None] + w[None, :]
                    x = tl.load(at, mask=cells & here[:, None], other=0)
                    lse = tl.load(l_ptr + l_row, mask=here, other=_NEG_INF)
                some = tl.abs(lse) < float("inf")  # tokens; NaN and +inf mean none, as -inf does
                if empty_ptr is not None:
                    some &= tl.load(empty_ptr + b) == 0
                lse = tl.where(some, lse, _NEG_INF)
                x = tl.where(some[:, None], x, 0)
                x = tl.minimum(x, _NEVER_SENT - 1)
                epoch = tl.load(epochs + row, mask=row != first_row, other=first_epoch)
                # In a peer's memory under this rank's number, in ours under the peer's.
                slot_row, number = (epoch & 1) * ROWS + row, me + n * 0
                rows = _rows(base, DATA, slot_row, number, w, N, W)
                tl.store(rows, x, mask=cells, cache_modifier=".wt")
                lses = _line(base, LSES, slot_row, number, LINE)
                tl.store(lses, lse.to(tl.uint32, bitcast=True), mask=live, cache_modifier=".wt")

        if PHASE & 2:
            status = status_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            start, end = first_row, rows_here
            if TURNS:
                start += turn * step
                end = start + 1
            for row in tl.range(start, end, step):
                epoch = tl.load(epochs + row, mask=row != first_row, other=first_epoch)
                home, slot_row = own + base * 0, (epoch & 1) * ROWS + row
                rows = _rows(home, DATA, slot_row, n, w, N, W)
                lses = _line(home, LSES, slot_row, n, LINE)
                polls = 0
                # The value that is never sent is the largest.
                x = tl.load(rows, mask=cells, other=0, volatile=True)
                bits = tl.load(lses, mask=live, other=0, volatile=True)
                while _any_thread(tl.maximum(tl.max(x), tl.max(bits)) == _NEVER_SENT):
                    polls += 1
                    if polls % _POLLS_PER_REPORT == 0:
                        _report(status, bits == _NEVER_SENT, n, epoch, layer)
                    x = tl.load(rows, mask=cells, other=0, volatile=True)
                    bits = tl.load(lses, mask=live, other=0, volatile=True)

                lse = tl.where(live, bits.to(tl.float32, bitcast=True), _NEG_INF)
                b, h, part = _row(first_token, row, OWNED, PARTS)
                head = me * OWNED + h
                is_head = head < HEADS
                top = tl.max(lse, 0)
                if sink_ptr is not None:
                    sink_at = sink_ptr + tl.program_id(1) * OWNED + h
                    sink = sink_of(tl.load(sink_at, mask=is_head, other=_NEG_INF), BASE2)
                    top = tl.maximum(top, sink)
                shift = shift_of(top)
                weight = weight_of(lse, shift, BASE2)
                total = tl.sum(weight, 0)
                if sink_ptr is not None:
                    total += weight_of(sink, shift, BASE2)
                weight = weight / tl.maximum(total, 1.0)
                y = tl.sum(_floats(x, WIRE) * weight[:, None], 0)

                wanted = is_head & (d < D)
                VECTOR: tl.constexpr = 128 // y_ptr.dtype.element_ty.primitive_bitwidth
                at = y_ptr + (b * y_b + h * y_h.to(tl.int64)) * VECTOR + part * D + d
                tl.store(at, y.to(y_ptr.dtype.element_ty), mask=wanted)
                whole = lse_of(total, shift, BASE2)
                tl.store(y_lse_ptr + b * yl_b + h * yl_h, whole, mask=is_head & (part == 0))
                # Last, off the path of the result. The words and the epoch are only ours until the
                # row's next call.
                tl.store(rows, tl.full(x.shape, _NEVER_SENT, tl.uint32), mask=cells)
                tl.store(lses, tl.full(bits.shape, _NEVER_SENT, tl.uint32), mask=live)
                tl.store(epochs + row, epoch + 1)


@triton.jit
def _whole(part, n, w, WORDS: tl.constexpr):
    """Load a part of a query, once for every rank: all of its words but those never sent."""
    at = tl.multiple_of(part + n[:, None] * 0, (16, 16)) + w[None, :]
    return tl.minimum(tl.load(at, mask=(w < WORDS)[None, :], other=0), _NEVER_SENT - 1)


@triton.jit(do_not_specialize=["rank", "tokens", "layer", "l_b", "l_h", "r_b", "r_h"])
def gather_kernel(
    left_ptr,
    right_ptr,  # None where a query is of one part
    peers_ptr,  # int64 [N]: address of each rank's workspace
    epochs_ptr,
    y_ptr,  # [tokens, N * OWNED, LEFT + RIGHT] of each rank in this launch, in words
    status_ptr,
    rank,
    tokens,
    layer,
    l_b,  # strides in 16-byte vectors
    l_h,
    r_b,
    r_h,
    N: tl.constexpr,
    OWNED: tl.constexpr,
    LEFT: tl.constexpr,  # words of each part
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Send queries of own heads, wait for everybody's, store them; `gather` fills in the arguments.

    Grid as for the exchange.
    """
    W: tl.constexpr = LEFT + RIGHT
    me = rank + tl.program_id(1)
    first_token = tl.program_id(1).to(tl.int64) * tokens
    n = tl.arange(0, power_of_2(N))
    lw = tl.arange(0, power_of_2(LEFT))
    rw = tl.arange(0, power_of_2(RIGHT) if RIGHT else 1)
    live = n < N
    left_cells = live[:, None] & (lw < LEFT)[None, :]
    right_cells = live[:, None] & (rw < RIGHT)[None, :]
    base = tl.load(peers_ptr + n, mask=live, other=0)
    own = tl.load(peers_ptr + me)
    epochs = epochs_ptr + tl.program_id(1) * ROWS
    first_row = tl.program_id(0)
    first_epoch = tl.load(epochs + first_row)

    if PHASE & 1:
        for row in tl.range(first_row, tokens * OWNED, tl.num_programs(0)):
            b, h = first_token + row // OWNED, row % OWNED
            epoch = tl.load(epochs + row, mask=row != first_row, other=first_epoch)
            slot_row, number = (epoch & 1) * ROWS + row, me + n * 0
            left = left_ptr.to(tl.pointer_type(tl.uint32)) + (b * l_b + h * l_h.to(tl.int64)) * 4
            x = _whole(left, n, lw, LEFT)
            lefts = _rows(base, 0, slot_row, number, lw, N, W)
            tl.store(lefts, x, mask=left_cells, cache_modifier=".wt")
            if RIGHT:
                right = right_ptr.to(tl.pointer_type(tl.uint32))
                x = _whole(right + (b * r_b + h * r_h.to(tl.int64)) * 4, n, rw, RIGHT)
                rights = _rows(base, 4 * LEFT, slot_row, number, rw, N, W)
                tl.store(rights, x, mask=right_cells, cache_modifier=".wt")

    if PHASE & 2:
        status = status_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        for row in tl.range(first_row, tokens * OWNED, tl.num_programs(0)):
            epoch = tl.load(epochs + row, mask=row != first_row, other=first_epoch)
            home, slot_row = own + base * 0, (epoch & 1) * ROWS + row
            lefts = _rows(home, 0, slot_row, n, lw, N, W)
            rights = _rows(home, 4 * LEFT, slot_row, n, rw, N, W)
            polls = 0
            x = tl.load(lefts, mask=left_cells, other=0, volatile=True)
            most = tl.max(x, 1)
            if RIGHT:
                z = tl.load(rights, mask=right_cells, other=0, volatile=True)
                most = tl.maximum(most, tl.max(z, 1))
            while _any_thread(tl.max(most, 0) == _NEVER_SENT):
                polls += 1
                if polls % _POLLS_PER_REPORT == 0:
                    _report(status, most == _NEVER_SENT, n, epoch, layer)
                x = tl.load(lefts, mask=left_cells, other=0, volatile=True)
                most = tl.max(x, 1)
                if RIGHT:
                    z = tl.load(rights, mask=right_cells, other=0, volatile=True)
                    most = tl.maximum(most, tl.max(z, 1))

            b, h = first_token + row // OWNED, row % OWNED
            heads = (b * N + n) * OWNED + h
            y = (y_ptr.to(tl.pointer_type(tl.uint32)) + heads * W)[:, None]
            tl.store(tl.multiple_of(y, (16, 16)) + lw[None, :], x, mask=left_cells)
            tl.store(lefts, tl.full(x.shape, _NEVER_SENT, tl.uint32), mask=left_cells)
            if RIGHT:
                tl.store(tl.multiple_of(y, (16, 16)) + (LEFT + rw)[None, :], z, mask=right_cells)
                tl.store(rights, tl.full(z.shape, _NEVER_SENT, tl.uint32), mask=right_cells)
            tl.store(epochs + row, epoch + 1)
