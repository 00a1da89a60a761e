"""Softmax-exact combination of partial attention outputs, and the forms they travel in.

Attention over a sequence that is split among N ranks gives N partial outputs o_n with the
log-sum-exp l_n of their scores. With m = max l_n and w_n = exp(l_n - m), attention over the whole
sequence is sum(w_n o_n) / sum(w_n), and its LSE is m + log sum(w_n) (Milakov and Gimelshein,
arXiv:1805.02867). `combine` computes it from shards that lie together, after an all-to-all of what
`pack` lays out. `rescale` gives one rank's summand, for a reduction over the ranks.

Two implementations of the same contract stand side by side: Triton kernels (`lse_combine_triton`),
and plain torch (`lse_combine_torch`) where Triton cannot run. ``TRITON_INTERPRET=1`` selects the
kernels for CPU tensors too.

A shard without tokens has LSE -inf; NaN and +inf mean the same. Whatever stands in its output, NaN
included, never reaches the result. Where all shards are empty the result is 0 with LSE -inf.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Literal, overload

import torch

from sglang_helix.srt.layers.dcp import lse_combine_torch
from sglang_helix.srt.layers.dcp.packed_rows import check_packed, packed_row_bytes
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

try:
    import triton
except ImportError:  # the plain torch implementation needs nothing
    triton = None
else:
    from sglang_helix.srt.layers.dcp import lse_combine_triton

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PAYLOADS = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


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
) -> Partial: ...


def combine(
    partials: torch.Tensor,
    lse: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    base2: bool = False,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | Partial:
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
        _implementation(partials).combine(partials, lse, out, out_lse, base2, sinks)
    return out if out_lse is None else Partial(out, out_lse)


@overload
def merge(
    whole: Partial,
    part: Partial | None,
    *,
    first: int = ...,
    out_dtype: torch.dtype,
    base2: bool = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def merge(
    whole: Partial,
    part: Partial | None,
    *,
    first: int = ...,
    out_dtype: torch.dtype,
    base2: bool = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[True],
) -> Partial: ...


def merge(
    whole: Partial,
    part: Partial | None,
    *,
    first: int = 0,
    out_dtype: torch.dtype,
    base2: bool = False,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | Partial:
    """Merge two partial outputs that lie apart, the second of some of the first's queries.

    Args:
        whole: out [B, h, D] bf16, fp16 or fp32 and lse [B, h] fp32, any strides.
        part: the same of queries first to first + b, in any of these dtypes: [b, h, D] and [b, h].
            None where there is nothing but the first: it is then as good as its own output.
        first: the first of these queries.
        out_dtype: bf16, fp16 or fp32.
        base2, sinks, return_lse: as in `combine`; sinks are of all queries.

    Returns:
        out [B, h, D] in out_dtype, or ``(out, lse [B, h] fp32)`` with ``return_lse``.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported.
    """
    if part is None:
        alone = whole.out[None], whole.lse[None]
        if sinks is None:
            out = whole.out.to(out_dtype)
            return Partial(out, whole.lse) if return_lse else out
        if return_lse:
            return combine(*alone, out_dtype=out_dtype, base2=base2, sinks=sinks, return_lse=True)
        return combine(*alone, out_dtype=out_dtype, base2=base2, sinks=sinks)
    _check_merge(whole, part, first, out_dtype, sinks)
    out = whole.out.new_empty(whole.out.shape, dtype=out_dtype)
    out_lse = whole.lse.new_empty(whole.lse.shape) if return_lse else None
    if out.numel():
        _implementation(out).merge(whole, part, first, out, out_lse, base2, sinks)
    return out if out_lse is None else Partial(out, out_lse)


def combine_splits(splits: Splits, dtype: torch.dtype) -> Partial:
    """Merge the splits of each sequence, of which each has its own number: one launch.

    Args:
        splits: of B sequences; see `Splits`. Strides may be any.
        dtype: of the output: bf16, fp16 or fp32.

    Returns:
        out [B, H, D] and lse [B, H] fp32; 0 and -inf for sequences without tokens.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is not supported.
    """
    _check_splits(splits, dtype)
    B, H, _, D = splits.out.shape
    out = splits.out.new_empty((B, H, D), dtype=dtype)
    out_lse = splits.lse.new_empty((B, H))
    if out_lse.numel():
        _implementation(out).combine_splits(splits, out, out_lse)
    return Partial(out, out_lse)


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
        _implementation(out).rescale(out, lses, rank, scaled, total, base2)
    return scaled, total


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
        _implementation(out).pack(out.view(_BITS[out.dtype.itemsize]), lse, send)
    return send


def _implementation(x: torch.Tensor) -> ModuleType:
    return lse_combine_triton if _runs_triton(x) else lse_combine_torch


def _runs_triton(x: torch.Tensor) -> bool:
    return triton is not None and (x.is_cuda or _INTERPRETED)


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
    whole: Partial,
    part: Partial,
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
        check_packed("send", send, D, out.dtype)
        if send.shape[:3] != (num_ranks, B, H // num_ranks):
            raise ValueError(
                f"send must be [N, B, H/N, row bytes] = {[num_ranks, B, H // num_ranks]} + "
                f"[{send.shape[3]}] for out {list(out.shape)}, got {list(send.shape)}"
            )
        if send.device != out.device:
            raise ValueError(f"send is on {send.device} and out on {out.device}")


def _check_splits(splits: Splits, dtype: torch.dtype) -> None:
    partials, lse, indptr, counts = splits[:4]
    if partials.ndim != 4:
        raise ValueError(f"partials must be [B, H, S, D], got {list(partials.shape)}")
    if partials.dtype != torch.float32 or dtype not in _PAYLOADS:
        raise TypeError(
            f"splits must be fp32 and their result bf16, fp16 or fp32, got {partials.dtype} and "
            f"{dtype}"
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
