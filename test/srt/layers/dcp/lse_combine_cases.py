"""Partial outputs to combine, in any layout, and what must come out: by definition, in float64."""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from sglang_helix.srt.layers.dcp import lse_combine

HAS_TRITON = importlib.util.find_spec("triton") is not None
INF = math.inf
EMPTY = (-INF, INF, math.nan)  # what an LSE says where a shard has no token
BOUND = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
FLOATS = list(BOUND)
SIZES = [1, 7, 16, 20, 64, 80, 96, 128, 192, 512, 576]

INTERPRETED = lse_combine._INTERPRETED
compiled_only = pytest.mark.skipif(INTERPRETED, reason="not in the interpreter")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device"
)


def summands_in_float64(
    partials: torch.Tensor, lse: torch.Tensor, base2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: o_n weighted by 2^l_n or e^l_n over their sum, of shards that hold a token.

    Returns [N, B, h, D] and the LSE [B, h].
    """
    x, logs = partials.double().cpu(), lse.double().cpu()
    logs = torch.where(logs.isfinite(), logs * (math.log(2) if base2 else 1), -INF)
    x = torch.where((logs > -INF)[..., None], x, 0)
    total = torch.logsumexp(logs, 0)
    weight = torch.where(logs > -INF, (logs - total).exp(), 0)
    return x * weight[..., None], total / (math.log(2) if base2 else 1)


def in_float64(
    partials: torch.Tensor, lse: torch.Tensor, base2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    summands, total = summands_in_float64(partials, lse, base2)
    return summands.sum(0), total


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    got = got.double().cpu()
    assert got.isfinite().all()
    assert (got - want).norm() <= bound * want.norm()


def assert_same_lse(got: torch.Tensor, want: torch.Tensor) -> None:
    got = got.double().cpu()
    empty = want == -INF
    assert torch.equal(got == -INF, empty)
    error = (got - want).masked_fill(empty, 0).abs()
    assert (error <= 2e-6 * want.abs().masked_fill(empty, 0).clamp_min(1)).all()


def laid_out(x: torch.Tensor, order: list[int], pitch: int, step: int) -> torch.Tensor:
    """The same values with the outer dimensions stored in another order, rows padded or spread."""
    outer = [x.shape[i] for i in order]
    room = torch.empty((*outer, x.shape[-1] * step + pitch), dtype=x.dtype, device=x.device)
    room.view(torch.uint8).fill_(0xFF)  # NaN in every float format
    rows = room[..., : x.shape[-1] * step : step]
    view = rows.permute(*[order.index(i) for i in range(len(order))], -1)
    view.copy_(x)
    return view


class Case(NamedTuple):
    partials: torch.Tensor
    lse: torch.Tensor
    base2: bool
    out_dtype: torch.dtype | None

    def __repr__(self) -> str:
        shape, strides = list(self.partials.shape), self.partials.stride()
        return (
            f"Case({self.partials.dtype} {shape} strides {strides}, base2={self.base2}, "
            f"lse strides {self.lse.stride()}, out_dtype={self.out_dtype})"
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    N, B, h = (
        draw(st.integers(1, 9) | st.just(16)),
        draw(st.integers(0, 5)),
        draw(st.integers(1, 4)),
    )
    D, dtype = draw(st.sampled_from(SIZES)), draw(st.sampled_from(FLOATS))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn((N, B, h, D), generator=rng).to(dtype)
    lse = torch.randn((N, B, h), generator=rng) * draw(st.sampled_from([1.0, 30.0, 1e4]))
    share_empty = draw(st.sampled_from([0.0, 0.3, 1.0]))
    empty = torch.rand((N, B, h), generator=rng) < share_empty
    lse[empty] = draw(st.sampled_from(EMPTY))
    x[empty] = draw(st.sampled_from([0.0, math.nan, INF, -INF]))
    pitch, step = draw(st.sampled_from([0, 0, 2, 8])), draw(st.sampled_from([1, 1, 2]))
    order = draw(st.permutations(range(3)))
    lse = laid_out(lse[..., None], draw(st.permutations(range(3))), draw(st.integers(0, 3)), 1)[
        ..., 0
    ]
    return Case(
        laid_out(x, order, pitch, step),
        lse,
        draw(st.booleans()),
        draw(st.sampled_from([None, *FLOATS])),
    )


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """To the device with its strides: Tensor.to drops the gaps."""
    if x.device.type == device:
        return x
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return y.copy_(x)
