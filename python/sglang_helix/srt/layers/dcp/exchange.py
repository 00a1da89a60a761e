"""Seam 4, exchange: partial attention of a KVP group's heads -> each rank's own heads, exact.

Every rank of the group brings out [B, H, D] and lse [B, H] (fp32) of the same B queries and H
heads, computed over its own tokens. Rank j ends with out [B, H/K, D] and lse [B, H/K] of heads
[j * H/K, (j + 1) * H/K) over all tokens:

    lse = log sum_n exp(lse_n),    out = sum_n exp(lse_n - lse) out_n

(the softmax identity behind flash decoding). A rank without tokens brings lse = -inf; what stands
in its out is never used.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from sglang_helix.srt.layers.dcp.lse_combine import combine, pack, rescale, unpack

# GroupCoordinator of the KVP group; SGLang is untyped.
Group = Any


class Exchange(Protocol):
    """One implementation per communication backend; `group` is a GroupCoordinator."""

    def __call__(
        self, out: torch.Tensor, lse: torch.Tensor, group: Group, *, base2: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [B, H, D], lse [B, H]) -> (out [B, H/K, D] in out's dtype, lse [B, H/K])."""


def a2a(
    out: torch.Tensor, lse: torch.Tensor, group: Group, *, base2: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """One all-to-all of packed rows (output and LSE together), then a local combine."""
    send = pack(out, lse, group.world_size)
    received = torch.empty_like(send)
    group.all_to_all_single(received, send)
    partials, lses = unpack(received, out.shape[-1], out.dtype)
    return combine(partials, lses, base2=base2, return_lse=True)


def ag_rs(
    out: torch.Tensor, lse: torch.Tensor, group: Group, *, base2: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """All-gather of the LSEs, then a reduce-scatter of the rescaled outputs in fp32."""
    lses = lse.new_empty(group.world_size, *lse.shape)
    group.all_gather_into_tensor(lses, lse[None].contiguous())
    scaled, total = rescale(out, lses, group.rank_in_group, base2=base2)
    heads = out.shape[1] // group.world_size
    reduced = scaled.new_empty(heads, *scaled.shape[1:])
    group.reduce_scatter_tensor(reduced, scaled)
    first = group.rank_in_group * heads
    return reduced.transpose(0, 1).to(out.dtype), total[:, first : first + heads]


EXCHANGES: dict[str, Exchange] = {"a2a": a2a, "ag_rs": ag_rs}
