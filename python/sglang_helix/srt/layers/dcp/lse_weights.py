"""How partial results become one by their LSEs, on a device: in every kernel that merges some.

Kernels hold the results of a row's shards apart (`merged`), in one tile, or one after the other.
What makes a shard's weight of its LSE is the same: `counted`, `shift_of`, `weight_of`, `lse_of`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def counted(lse):
    """An LSE as it counts: NaN and +inf say that there is no token, as -inf does."""
    return tl.where((lse != lse) | (lse == float("inf")), float("-inf"), lse)


@triton.jit
def shift_of(top):
    """What is taken off LSEs of which this is the highest; 0 where there is no token at all."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def weight_of(lse, shift, BASE2: tl.constexpr):
    """Of a shard in the softmax sum. The sum is then at least 1, or 0 where there is no token."""
    return tl.exp2(lse - shift) if BASE2 else tl.exp(lse - shift)


@triton.jit
def lse_of(total, shift, BASE2: tl.constexpr):
    """The LSE of a sum of weights."""
    return shift + (tl.log2(total) if BASE2 else tl.log(total))


@triton.jit
def sink_of(sink, BASE2: tl.constexpr):
    """A sink's logit, natural as models have it, as an LSE: one more shard, whose output is 0."""
    sink = sink.to(tl.float32)
    return sink * _LOG2_E if BASE2 else sink


@triton.jit
def merged(lses, parts, sink, BASE2: tl.constexpr):
    """Shards [R] and [R, C], in tuples, and sinks [R] or None: the whole [R, C] and its LSE [R]."""
    top = counted(lses[0])
    for n in tl.static_range(1, len(lses)):
        top = tl.maximum(top, counted(lses[n]))
    if sink is not None:
        top = tl.maximum(top, sink)
    shift = shift_of(top)
    total = tl.zeros_like(shift)
    if sink is not None:
        total += weight_of(sink, shift, BASE2)
    whole = tl.zeros(parts[0].shape, tl.float32)
    for n in tl.static_range(len(lses)):
        lse = counted(lses[n])
        weight = weight_of(lse, shift, BASE2)
        total += weight
        part = tl.where((lse == float("-inf"))[:, None], 0.0, parts[n].to(tl.float32))
        whole += part * weight[:, None]
    whole *= (1.0 / tl.maximum(total, 1.0))[:, None]
    return whole, lse_of(total, shift, BASE2)


@triton.jit
def live_splits(length, count, block):
    """Splits that were written; `partial.Splits` says how tokens are dealt."""
    share = tl.cdiv(tl.cdiv(length, tl.maximum(count, 1)), block) * block
    return tl.cdiv(length, tl.maximum(share, 1)).to(tl.int32)
