"""Rows of partial attention as one all-to-all of bytes moves them: output and LSE together.

A row is one token and head: D elements padded to 16 bytes, then 16 bytes with the fp32 LSE, so that
all rows stay 16-byte aligned.
"""

from __future__ import annotations

import torch

TAIL_BYTES = 16


def packed_row_bytes(D: int, dtype: torch.dtype) -> int:
    """Bytes of one packed row."""
    return -(-D * dtype.itemsize // 16) * 16 + TAIL_BYTES


def unpack(recv: torch.Tensor, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of packed rows, without a copy: partials [N, B, h, D] and lse [N, B, h] for `combine`.

    Args:
        recv: contiguous uint8 [N, B, h, row bytes], as `lse_combine.pack` lays it out.
        D: elements of a payload.
        dtype: the payload's.

    Raises:
        ValueError: ``recv`` does not hold such rows.
        TypeError: ``recv`` is not uint8.
    """
    check_packed("recv", recv, D, dtype)
    payload = recv[..., : D * dtype.itemsize].view(dtype)
    lse = recv[..., -TAIL_BYTES : -TAIL_BYTES + 4].view(torch.float32)[..., 0]
    return payload, lse


def check_packed(name: str, rows: torch.Tensor, D: int, dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError unless these are packed rows; see `unpack`."""
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
