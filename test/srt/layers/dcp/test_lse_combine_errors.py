"""What combine, merge, rescale, pack and unpack refuse, by the sizes and dtypes at fault."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from sglang_helix.srt.layers.dcp import lse_combine, packed_rows
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

X = torch.zeros(2, 3, 4, 16)
L = torch.zeros(2, 3, 4)
P, FP32 = torch.zeros(2, dtype=torch.int32), {"out_dtype": torch.float32}
SEND = torch.zeros(2, 3, 2, 80, dtype=torch.uint8)
ERRORS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("combine", (X[0], L), {}, ValueError, "[3, 4, 16]"),
    ("combine", (X[:0], L[:0]), {}, ValueError, "[0, 3, 4, 16]"),
    ("combine", (X, L[:1]), {}, ValueError, "[1, 3, 4]"),
    ("combine", (X, L.double()), {}, TypeError, "float64"),
    ("combine", (X, L.to("meta")), {}, ValueError, "meta"),
    ("combine", (X.double(), L), {}, TypeError, "float64"),
    ("combine", (X.to(torch.float8_e4m3fn), L), {}, TypeError, "float8_e4m3fn"),
    ("combine", (X, L), {"out": X[0, :2]}, ValueError, "[2, 4, 16]"),
    ("combine", (X, L), {"out": X[0].to("meta")}, ValueError, "meta"),
    ("combine", (X, L), {"out": X[0].int()}, TypeError, "int32"),
    ("combine", (X, L), {"out_dtype": torch.float64}, TypeError, "float64"),
    ("combine", (X, L), {"out": X[0], "out_dtype": torch.half}, TypeError, "float16"),
    ("merge", (Partial(X[0], L[0]), Partial(X[0], L[0, 1:])), FP32, ValueError, "[1, 2, 4]"),
    (
        "merge",
        (Partial(X[0], L[0]), Partial(X[0, :, 1:], L[0, :, 1:])),
        FP32,
        ValueError,
        "[3, 3, 16]",
    ),
    (
        "merge",
        (Partial(X[0], L[0]), Partial(X[0, 1:], L[0, 1:])),
        {"first": 2} | FP32,
        ValueError,
        "2 queries",
    ),
    ("merge", (Partial(X[0], L[0]), Partial(X[0], L[0].half())), FP32, TypeError, "float16"),
    (
        "merge",
        (Partial(X[0], L[0]), Partial(X[0], L[0])),
        {"out_dtype": torch.int8},
        TypeError,
        "int8",
    ),
    ("rescale", (X, L, 0), {}, ValueError, "[2, 3, 4, 16]"),
    ("rescale", (X[0].to(torch.float8_e5m2), L, 0), {}, TypeError, "float8_e5m2"),
    ("rescale", (X[0], L[0], 0), {}, ValueError, "[3, 4]"),
    ("rescale", (X[0], L[:, 1:], 0), {}, ValueError, "[2, 2, 4]"),
    ("rescale", (X[0], L.half(), 0), {}, TypeError, "float16"),
    ("rescale", (X[0], L.to("meta"), 0), {}, ValueError, "meta"),
    ("rescale", (X[0], L, 2), {}, ValueError, "rank is 2"),
    ("rescale", (X[0], L, -1), {}, ValueError, "rank is -1"),
    (
        "combine_splits",
        (Splits(X, X[..., 0], P, P, 8), torch.float32),
        {},
        ValueError,
        "got 2 and 2",
    ),
    ("combine_splits", (Splits(X, L[:1], P, P, 8), torch.float32), {}, ValueError, "[1, 3, 4]"),
    ("combine_splits", (Splits(X.half(), L, P, P, 8), torch.float32), {}, TypeError, "float16"),
    ("combine_splits", (Splits(X, L, P, P, 8), torch.double), {}, TypeError, "float64"),
    ("combine_splits", (Splits(X[0], L, P, P, 8), torch.float32), {}, ValueError, "[3, 4, 16]"),
    ("pack", (X, L, 2), {}, ValueError, "[2, 3, 4, 16]"),
    ("pack", (X[0], L[0], 3), {}, ValueError, "4 heads"),
    ("pack", (X[0], L[0], 0), {}, ValueError, "0 ranks"),
    ("pack", (X[0].double(), L[0], 2), {}, TypeError, "float64"),
    ("pack", (X[0], L[0].half(), 2), {}, TypeError, "float16"),
    ("pack", (X[0], L[1:], 2), {}, ValueError, "[1, 3, 4]"),
    ("pack", (X[0], L[0], 2, SEND.float()), {}, TypeError, "float32"),
    ("pack", (X[0], L[0], 2, SEND[..., :64]), {}, ValueError, "[2, 3, 2, 64]"),
    ("pack", (X[0], L[0], 2, SEND[:, :2].contiguous()), {}, ValueError, "[2, 2, 2, 80]"),
    ("pack", (X[0], L[0], 2, SEND.to("meta")), {}, ValueError, "meta"),
    ("unpack", (SEND, 20, torch.half), {}, ValueError, "take 64 bytes"),
    ("unpack", (SEND.transpose(1, 2), 16, torch.float), {}, ValueError, "strides"),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "error", "names"), ERRORS)
def test_errors_name_the_sizes(
    function: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=re.escape(names)):
        getattr(packed_rows if function == "unpack" else lse_combine, function)(*args, **kwargs)
