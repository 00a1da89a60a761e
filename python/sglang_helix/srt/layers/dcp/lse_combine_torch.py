"""What `lse_combine` does, in plain torch: for CPU tensors, and where no triton is installed.

The functions take what `lse_combine`'s of the same names have checked, and write to `out`.
"""

from __future__ import annotations

import torch

from sglang_helix.srt.layers.dcp.packed_rows import TAIL_BYTES, unpack
from sglang_helix.srt.layers.dcp.partial import Partial, Splits

_LOG2_E = 1.4426950408889634


def combine(
    partials: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    out_lse: torch.Tensor | None,
    base2: bool,
    sinks: torch.Tensor | None,
) -> None:
    """Partials [N, B, h, D] and lse [N, B, h] into out [B, h, D] and out_lse [B, h]."""
    share, total = _shares(lse, base2, sinks)
    out.copy_((_counted(partials, lse) * share[..., None]).sum(0))
    if out_lse is not None:
        out_lse.copy_(total)


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
    some = slice(first, first + len(part.out))
    lses = torch.stack([whole.lse, torch.full_like(whole.lse, -torch.inf)])
    lses[1, some] = part.lse
    share, total = _shares(lses, base2, sinks)
    values = _counted(*whole) * share[0][..., None]
    values[some] += _counted(*part) * share[1, some][..., None]
    out.copy_(values)
    if out_lse is not None:
        out_lse.copy_(total)


def combine_splits(splits: Splits, out: torch.Tensor, out_lse: torch.Tensor) -> None:
    """The splits of B sequences into out [B, H, D] and out_lse [B, H]."""
    B, _, S = splits.lse.shape
    lens = splits.indptr[1 : B + 1] - splits.indptr[:B]
    share = -(-lens // splits.counts[:B].clamp_min(1))
    share = -(-share // splits.block) * splits.block
    written = torch.arange(S, device=lens.device) * share[:, None] < lens[:, None]
    lse = splits.lse.masked_fill(~written[:, None], -torch.inf)
    merged = torch.empty_like(out, dtype=torch.float32)
    combine(splits.out.movedim(2, 0), lse.movedim(2, 0), merged, out_lse, False, None)
    out.copy_(merged * splits.v_scale)


def rescale(
    out: torch.Tensor,
    lses: torch.Tensor,
    rank: int,
    scaled: torch.Tensor,
    total: torch.Tensor,
    base2: bool,
) -> None:
    """Out [B, H, D] by the share of lses[rank] into scaled [H, B, D], and LSEs into total."""
    share, lse = _shares(lses, base2, None)
    scaled.copy_((_counted(out, lses[rank]) * share[rank][..., None]).transpose(0, 1))
    total.copy_(lse)


def pack(out: torch.Tensor, lse: torch.Tensor, send: torch.Tensor) -> None:
    """Out [B, H, D] and lse [B, H] into rows by owner, send [N, B, H/N, row bytes]."""
    payload, packed_lse = unpack(send, out.shape[-1], out.dtype)
    N, B, h, D = payload.shape
    payload.copy_(out.view(B, N, h, D).transpose(0, 1))
    lse = lse.masked_fill(_without_tokens(lse), -torch.inf)
    send[..., -TAIL_BYTES:] = 0
    packed_lse.copy_(lse.view(B, N, h).transpose(0, 1))


def _without_tokens(lse: torch.Tensor) -> torch.Tensor:
    return ~lse.isfinite()


def _counted(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Outputs in fp32, 0 where there are no tokens."""
    return out.float().masked_fill(_without_tokens(lse)[..., None], 0)


def _shares(
    lse: torch.Tensor, base2: bool, sinks: torch.Tensor | None
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
