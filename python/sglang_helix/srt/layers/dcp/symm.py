"""Partial attention to combined heads in one kernel over symmetric memory.

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

Epochs. Each row counts its calls in the rank's own memory. No host state, so CUDA graphs replay;
no reset, so batch sizes may vary.

Residency. A program that waits keeps its place on the device. Where programs start in the order of
their numbers, as devices do and CUDA does not promise, fewer may fit than there are: whoever waits
for a row waits for one of the lowest that are left, and these have started on every rank. Where
ranks started them in other orders, all would have to fit (the model checks both); so a launch is
never larger than what fits.

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sglang_helix.srt.layers.dcp.lse_combine import live_splits
from sglang_helix.srt.layers.dcp.partial import VECTOR_BYTES, Splits

SEND, RECEIVE = 1, 2  # phases of the kernel; apart only where ranks run one after another (tests)

# A NaN, in fp32 and in both halves of two fp16 or bf16; sent as the NaN below it. LSEs sent are
# never NaN.
_NEVER_SENT: tl.constexpr = tl.constexpr(0xFFFFFFFF)
_NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))
_INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.constexpr_function
def _power_of_2(number):
    """The next power of two. Where there is no GPU, SGLang replaces Triton's own of that name."""
    return 1 << (number - 1).bit_length()


_POLLS_PER_REPORT: tl.constexpr = tl.constexpr(1 << 12)  # some milliseconds
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_FP8_MAX: tl.constexpr = tl.constexpr(448.0)  # e4m3fn
_FP8_GROUP: tl.constexpr = tl.constexpr(128)
_FP8_FLOOR: tl.constexpr = tl.constexpr(1e-10)  # of a group's largest magnitude, as in SGLang

_TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_VECTOR = VECTOR_BYTES  # the widest access; rows start on multiples of it
_LINE_BYTES = 128  # of a GPU's caches
# Virtual ranks on one H200, no link in between; the two choices of the tile were tried by hand.
# A head of 512 elements (MLA, 64 tokens): 80 us as one row, 90 as two, 110 as four, in an earlier
# form of the kernel.
_WIDTH = 512  # elements of a row, at most
_WORDS_PER_THREAD = 64  # half of it, twice the warps: 2% less time at B = 1, 3 to 9% more above
# docs/figures/collectives-h100.csv: over NVLink, 2 and 4 H100s, up to 128 MiB that a rank sends, it
# takes 0.27 to 0.79 of the time of three launches, our own and SGLang's.
_MAX_BYTES = 128 << 20
_MAX_REGISTERS = 128  # per thread
_WARPS_PER_SM = 65536 // (32 * _MAX_REGISTERS)  # resident on every GPU since Volta


@dataclass(frozen=True)
class Layout:
    """What one rank's workspace holds and where; the same on every rank.

    What follows from the attributes is worked out once: every exchange reads it.

    Attributes:
        ranks: N.
        heads: H, query heads of a partial output; need not be divisible by N.
        head_dim: D; rows of D elements must be whole 16-byte vectors.
        wire: dtype of the pieces (bf16, fp16, fp32).
        max_tokens: the largest batch.
    """

    ranks: int
    heads: int
    head_dim: int
    wire: torch.dtype
    max_tokens: int

    def __post_init__(self) -> None:
        if self.wire not in _TL_DTYPE:
            raise TypeError(f"symm exchanges bf16, fp16 or fp32 rows, not {self.wire}")
        if self.head_dim * self.wire.itemsize % _VECTOR:
            raise ValueError(
                f"head_dim {self.head_dim} in {self.wire} is not whole 16-byte vectors, which symm "
                f"needs: use --dcp-comm-backend a2a"
            )

    @cached_property
    def owned(self) -> int:
        """Places for heads per rank: ceil(H/N)."""
        return -(-self.heads // self.ranks)

    def owned_by(self, rank: int) -> range:
        """The heads that a rank owns; the last ranks' may be fewer, or none."""
        return range(min(rank * self.owned, self.heads), min((rank + 1) * self.owned, self.heads))

    @cached_property
    def parts(self) -> int:
        """Rows that a head's output of one token is cut into: whole vectors, whole fp8 groups."""
        unit = _VECTOR // self.wire.itemsize
        if self.head_dim % _FP8_GROUP.value == 0:
            unit = _FP8_GROUP.value
        units = self.head_dim // unit
        fewest = -(-self.head_dim // _WIDTH)
        return next(parts for parts in range(fewest, units + 1) if units % parts == 0)

    @cached_property
    def rows_per_token(self) -> int:
        """Rows that a rank receives per token."""
        return self.owned * self.parts

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row, without its LSE."""
        return self.head_dim // self.parts * self.wire.itemsize

    @cached_property
    def token_bytes(self) -> int:
        """What a rank sends per token, without LSEs."""
        return self.ranks * self.rows_per_token * self.row_bytes

    def _places(self) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of each part of the workspace, in order."""
        sizes = {
            "lse": 2 * self.rows * 4 * self.line,
            "data": 2 * self.rows * self.ranks * self.row_bytes,
        }
        places, at = {}, 0
        for name, size in sizes.items():
            places[name] = at, size
            at += _align(size)
        return places

    @cached_property
    def rows(self) -> int:
        """Rows that the workspace holds in a slot, of each rank."""
        return self.max_tokens * self.rows_per_token

    @cached_property
    def line(self) -> int:
        """Words set aside for a row's N LSEs: whole cache lines of its own.

        Programs that polled the same lines held up each other and the senders: 8 virtual ranks,
        GQA, 8 tokens took 6.2 us on an H200 where they shared them, and 4.1 apart.
        """
        return _align(4 * self.ranks) // 4

    @cached_property
    def nbytes(self) -> int:
        """Size of the workspace."""
        at, size = self._places()["data"]
        return _align(at + size)

    @cached_property
    def constants(self) -> Mapping[str, Any]:
        """What the kernel is compiled for; every call shares them, so nobody may write to them."""
        places = {name: at for name, (at, _) in self._places().items()}
        constants = {
            "N": self.ranks,
            "HEADS": self.heads,
            "OWNED": self.owned,
            "PARTS": self.parts,
            "D": self.head_dim // self.parts,
            "WIRE": _TL_DTYPE[self.wire],
            "ROWS": self.rows,
            "LINE": self.line,
            "DATA": places["data"],
            "LSES": places["lse"],
        }
        return MappingProxyType(constants)

    def warps(self, splits: bool) -> int:
        """Warps per program: the pieces of a row, of all ranks, are one tile in registers."""
        return self._warps[splits]

    @cached_property
    def _warps(self) -> dict[bool, int]:
        return {splits: self._warps_of(splits) for splits in (False, True)}

    def _warps_of(self, splits: bool) -> int:
        words = self.head_dim // self.parts if splits else self.row_bytes // 4
        tile = _power_of_2(self.ranks) * _power_of_2(words)
        share = _WORDS_PER_THREAD // 2 if splits else _WORDS_PER_THREAD  # sums are held beside it
        return max(1, tile // (32 * share))

    def initialise(self, workspace: torch.Tensor) -> None:
        """Bring a rank's workspace (uint8 [nbytes], 16-byte aligned) into its first state.

        All ranks must have done so before any rank makes its first call.
        """
        workspace.fill_(0xFF)


def _align(size: int) -> int:
    return -(-size // _LINE_BYTES) * _LINE_BYTES


class Reduced(NamedTuple):
    """Result of an exchange on one rank; h is the number of heads the rank owns."""

    out: torch.Tensor
    """[B, h, D]; a transposed view of [h, B, D] where heads come first."""
    lse: torch.Tensor | None
    """[B, h] fp32 where asked for; includes the sinks."""
    scales: torch.Tensor | None
    """[B, h*D/128] fp32 where the output is fp8: out = fp8 value * scale of its group of 128."""


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
    top = tl.where(top == _NEG_INF, 0.0, top)
    total = tl.zeros(here.shape, tl.float32)
    merged = tl.zeros([here.shape[0], d.shape[0]], tl.float32)
    for s in tl.range(splits):
        lse = tl.load(lses + s * lse_step, mask=here, other=_NEG_INF)
        some = tl.abs(lse) < float("inf")
        weight = tl.where(some, tl.exp(lse - top), 0.0)
        cells = some[:, None] & (d < D)[None, :]
        x = tl.load((rows + s * row_step)[:, None] + d[None, :], mask=cells, other=0.0)
        total += weight
        merged += x * weight[:, None]
    return merged / tl.maximum(total, 1.0)[:, None], top + tl.log(total)


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
        *("yl_b", "yl_h", "scale_b", "scale_g", "block"),
    ]
)
def exchange_kernel(
    x_ptr,  # partial rows, or Splits.out
    l_ptr,
    peers_ptr,  # int64 [N]: address of each rank's workspace
    epochs_ptr,
    y_ptr,
    y_lse_ptr,
    scale_ptr,
    sink_ptr,
    status_ptr,
    indptr_ptr,
    counts_ptr,
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
    scale_b,
    scale_g,
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
    SPLITS: tl.constexpr,
    BASE2: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Send, wait, combine; `exchange` fills in the arguments.

    Grid (programs, ranks in this launch). The second axis is 1 except where one device plays all
    ranks; batches of these ranks stand one behind the other in all tensors.
    """
    W: tl.constexpr = D * WIRE.primitive_bitwidth // 32
    NP: tl.constexpr = _power_of_2(N)
    WP: tl.constexpr = _power_of_2(W)
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

    # All sends come before the first wait: programs that wait never hold back what a peer needs.
    if PHASE & 1:
        for row in tl.range(first_row, tokens * OWNED * PARTS, tl.num_programs(0)):
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
            lse = tl.where(some, lse, _NEG_INF)
            x = tl.where(some[:, None], x, 0)
            x = tl.minimum(x, _NEVER_SENT - 1)
            epoch = tl.load(epochs + row, mask=row != first_row, other=first_epoch)
            # In a peer's memory pieces stand under this rank's number, in ours under the peer's.
            slot_row, number = (epoch & 1) * ROWS + row, me + n * 0
            rows = _rows(base, DATA, slot_row, number, w, N, W)
            tl.store(rows, x, mask=cells, cache_modifier=".wt")
            lses = _line(base, LSES, slot_row, number, LINE)
            tl.store(lses, lse.to(tl.uint32, bitcast=True), mask=live, cache_modifier=".wt")

    if PHASE & 2:
        status = status_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        for row in tl.range(first_row, tokens * OWNED * PARTS, tl.num_programs(0)):
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
                sink = tl.load(sink_at, mask=is_head, other=_NEG_INF).to(tl.float32)
                sink = sink * _LOG2_E if BASE2 else sink
                top = tl.maximum(top, sink)
            top = tl.where(top == _NEG_INF, 0.0, top)
            weight = tl.exp2(lse - top) if BASE2 else tl.exp(lse - top)
            total = tl.sum(weight, 0)
            if sink_ptr is not None:
                total += tl.exp2(sink - top) if BASE2 else tl.exp(sink - top)
            # The total is at least 1, or 0 where there is no token at all.
            weight = weight / tl.maximum(total, 1.0)
            y = tl.sum(_floats(x, WIRE) * weight[:, None], 0)

            wanted = is_head & (d < D)
            if scale_ptr is not None:
                groups = tl.reshape(y, [DP // _FP8_GROUP, _FP8_GROUP])
                scale = tl.maximum(tl.max(tl.abs(groups), 1), _FP8_FLOOR) / _FP8_MAX
                y = tl.reshape(groups / scale[:, None], [DP])  # the conversion saturates
                g = tl.arange(0, DP // _FP8_GROUP)
                scales = (
                    scale_ptr + b * scale_b + ((h * PARTS + part) * (D // _FP8_GROUP) + g) * scale_g
                )
                tl.store(scales, scale, mask=is_head & (g < D // _FP8_GROUP))
            VECTOR: tl.constexpr = 128 // y_ptr.dtype.element_ty.primitive_bitwidth
            at = y_ptr + (b * y_b + h * y_h.to(tl.int64)) * VECTOR + part * D + d
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=wanted)
            if y_lse_ptr is not None:
                log = tl.log2(total) if BASE2 else tl.log(total)
                tl.store(y_lse_ptr + b * yl_b + h * yl_h, top + log, mask=is_head & (part == 0))
            # Last, off the path of the result. The words and the epoch are only ours until the
            # row's next call.
            tl.store(rows, tl.full([NP, WP], _NEVER_SENT, tl.uint32), mask=cells)
            tl.store(lses, tl.full([NP], _NEVER_SENT, tl.uint32), mask=live)
            tl.store(epochs + row, epoch + 1)


@dataclass(frozen=True)
class Workspace:
    """A rank's end of the exchange.

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
        calls: what `exchange` worked out for each form of its arguments.
    """

    layout: Layout
    peers: torch.Tensor
    epochs: torch.Tensor
    status: torch.Tensor
    rank: int
    warps: int
    memory: object
    local_ranks: int = 1
    calls: dict[tuple[object, ...], _Call] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def heads(self) -> int:
        """Heads of a result: those the rank owns, or places of each where there are several."""
        layout = self.layout
        return layout.owned if self.local_ranks > 1 else len(layout.owned_by(self.rank))


def exchange(
    workspace: Workspace,
    partial: tuple[torch.Tensor, torch.Tensor] | Splits,
    *,
    return_lse: bool = False,
    base2: bool = False,
    head_major: bool = False,
    out_dtype: torch.dtype | None = None,
    into: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    layer: int = 0,
    phase: int = SEND | RECEIVE,
) -> Reduced:
    """One launch: send partial rows to their owners, receive and combine the rows of own heads.

    `symm_workspace.SymmExchange.reduce` documents the arguments; ``phase`` is for proofs: it runs
    SEND and RECEIVE in two launches.
    """
    splits = partial if isinstance(partial, Splits) else None
    x, lse = partial[0], partial[1]
    form = (
        *map(_form, (x, lse, into, scales, sinks)),
        None if splits is None else (len(splits.indptr), len(splits.counts)),
        *(return_lse, base2, head_major, out_dtype, phase),
    )
    call = workspace.calls.get(form)
    if call is None:
        options = return_lse, base2, head_major, out_dtype, phase
        call = workspace.calls[form] = _prepare(workspace, partial, into, scales, sinks, *options)
    out = x.new_empty_strided(*call.out, dtype=call.dtype) if into is None else into
    if scales is None and call.scales:
        scales = lse.new_empty(call.scales)
    out_lse = lse.new_empty(call.lse) if return_lse else None
    if call.tokens == 0:  # on every rank: the epochs stand still together
        return Reduced(out, out_lse, scales)
    if call.copies:
        x = x.contiguous()
    exchange_kernel[call.grid](
        x,
        lse,
        workspace.peers,
        workspace.epochs,
        out,
        out_lse,
        scales,
        sinks,
        workspace.status,
        None if splits is None else splits.indptr,
        None if splits is None else splits.counts,
        workspace.rank,
        call.tokens,
        layer,
        *call.strides,
        1 if splits is None else splits.block,
        1.0 if splits is None else splits.v_scale,
        **call.options,
    )
    return Reduced(out, out_lse, scales)


class _Call(NamedTuple):
    """What follows from the forms of a call's arguments: the host works it out once for each."""

    tokens: int
    """Of each rank."""
    copies: bool
    """Whether the rows are copied, to be vectors."""
    out: tuple[torch.Size, tuple[int, ...]]
    """Shape and strides of the result."""
    dtype: torch.dtype
    lse: tuple[int, int]
    scales: tuple[int, int] | None
    """Shape of the scales of an fp8 result."""
    grid: tuple[int, int]
    strides: tuple[int, ...]
    options: Mapping[str, Any]


def _form(x: torch.Tensor | None) -> tuple[object, ...] | None:
    """All that decides how a tensor may be read or written, but where it is."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.data_ptr() % _VECTOR


def _prepare(
    workspace: Workspace,
    partial: tuple[torch.Tensor, torch.Tensor] | Splits,
    into: torch.Tensor | None,
    scales: torch.Tensor | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    base2: bool,
    head_major: bool,
    out_dtype: torch.dtype | None,
    phase: int,
) -> _Call:
    layout, splits = workspace.layout, isinstance(partial, Splits)
    x, lse = partial[0], partial[1]
    tokens = _check_partial(workspace, partial, base2)
    if tokens > layout.max_tokens:
        raise ValueError(
            f"symm was set up for at most {layout.max_tokens} tokens per call and got {tokens}: "
            f"raise max_tokens, or use --dcp-comm-backend a2a for such batches"
        )
    heads, B, D = workspace.heads, len(x), layout.head_dim
    dtype = into.dtype if into is not None else out_dtype or layout.wire
    if into is not None:
        out = into
    elif head_major:
        out = torch.empty((heads, B, D), dtype=dtype, device="meta").transpose(0, 1)
    else:
        out = torch.empty((B, heads, D), dtype=dtype, device="meta")
    scaled = dtype == torch.float8_e4m3fn
    scales_shape = (B, heads * D // _FP8_GROUP.value) if scaled else None
    if scales is None and scales_shape:
        scales = torch.empty(scales_shape, device="meta")
    _check_result((B, heads, D), out, scales, sinks, workspace.local_ranks * heads)
    copies = not splits and not _rows_are_vectors(x)
    if copies:
        x = torch.empty_like(x, device="meta", memory_format=torch.contiguous_format)
    warps = layout.warps(splits)
    strides = (
        *(_vectors(x) if splits else (*_vectors(x), 0)),
        *(lse.stride() if splits else (*lse.stride(), 0)),
        *_vectors(out),
        *((heads, 1) if return_lse else (0, 0)),
        *(scales.stride() if scales is not None else (0, 0)),
    )
    options = {
        **layout.constants,
        "SPLITS": splits,
        "BASE2": base2,
        "PHASE": phase,
        "num_warps": warps,
        "maxnreg": _MAX_REGISTERS,
        # Ranks on one device could keep each other out; one rank's programs always fit.
        "launch_cooperative_grid": workspace.local_ranks > 1,
    }
    return _Call(
        tokens,
        copies,
        (out.shape, out.stride()),
        dtype,
        (B, heads),
        scales_shape,
        (
            min(tokens * layout.rows_per_token, max(1, workspace.warps // warps)),
            workspace.local_ranks,
        ),
        strides,
        options,
    )


def largest_batch(ranks: int, heads: int, head_dim: int, wire: torch.dtype) -> int:
    """Tokens above which another exchange should be taken."""
    return max(1, _MAX_BYTES // Layout(ranks, heads, head_dim, wire, 0).token_bytes)


def resident_warps(device: torch.device, local_ranks: int = 1) -> int:
    """`Workspace.warps` for a GPU; a cooperative launch checks it again."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return _WARPS_PER_SM * multiprocessors // local_ranks


def _rows_are_vectors(x: torch.Tensor) -> bool:
    """Whether every row starts on a 16-byte vector and is contiguous."""
    *steps, step = x.stride()
    vector = _VECTOR // x.element_size()
    return (
        step == 1
        and x.data_ptr() % _VECTOR == 0
        and (
            all(step % vector == 0 for step in steps)
            or all(  # what has one element takes no step
                step % vector == 0 for size, step in zip(x.shape, steps, strict=False) if size > 1
            )
        )
    )


def _vectors(x: torch.Tensor) -> list[int]:
    """Strides of rows in 16-byte vectors."""
    vector = _VECTOR // x.element_size()
    sizes, steps = x.shape, x.stride()
    return [steps[dim] // vector if sizes[dim] > 1 else 0 for dim in range(len(sizes) - 1)]


def _check_partial(
    workspace: Workspace, partial: tuple[torch.Tensor, torch.Tensor] | Splits, base2: bool
) -> int:
    """Tokens per rank of a valid partial."""
    layout, (x, lse) = workspace.layout, partial[:2]
    shape = x.shape
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
    if len(shape) != dims or shape[1] != layout.heads or shape[-1] != layout.head_dim:
        raise ValueError(
            f"the partial output must be {expected} with H = {layout.heads}, "
            f"D = {layout.head_dim}, got {list(shape)}"
        )
    if x.dtype != dtype or lse.dtype != torch.float32:
        raise TypeError(f"expected {dtype} with an fp32 lse, got {x.dtype} and {lse.dtype}")
    if lse.shape != shape[:-1]:
        raise ValueError(f"lse must be {list(shape[:-1])}, got {list(lse.shape)}")
    return shape[0] // workspace.local_ranks


def _check_result(
    shape: tuple[int, int, int],
    out: torch.Tensor,
    scales: torch.Tensor | None,
    sinks: torch.Tensor | None,
    own_heads: int,
) -> None:
    if out.shape != shape or not _rows_are_vectors(out):
        raise ValueError(
            f"out must be {list(shape)} in rows of 16-byte vectors, got {list(out.shape)} with "
            f"strides {out.stride()}"
        )
    if out.dtype not in (*_TL_DTYPE, torch.float8_e4m3fn):
        raise TypeError(f"the result must be bf16, fp16, fp32 or float8_e4m3fn, got {out.dtype}")
    if (scales is not None) != (out.dtype == torch.float8_e4m3fn):
        raise TypeError(f"scales go with a float8_e4m3fn result, and this one is {out.dtype}")
    B, owned, D = shape
    group = _FP8_GROUP.value
    if scales is not None and (
        D % group or scales.shape != (B, owned * D // group) or scales.dtype != torch.float32
    ):
        raise ValueError(
            f"fp8 results have one fp32 scale per {group} elements of a head: head_dim {D} must be "
            f"a multiple, and scales {[B, owned * D // group]}, got {list(scales.shape)}"
        )
    if sinks is not None and (sinks.shape != (own_heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be contiguous [{own_heads}], got {list(sinks.shape)}")
