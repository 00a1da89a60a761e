"""Upstream's merge functions, led to the series' exchange, and the gather of MLA's queries.

Extends `sglang/srt/layers/dcp/comm.py`. MLA's forward code and the backends that are complete
upstream (FlashInfer-MLA, TRTLLM-MLA, CuteDSL-MLA) call these free functions by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_helix.srt.layers.attention.adapters import adapter
from sglang_helix.srt.layers.dcp.exchange import Exchanger, Group, a2a, ag_rs
from sglang_helix.srt.layers.dcp.gather import all_gather
from sglang_helix.srt.layers.dcp.partial import Partial, Splits


def is_mla_dcp_lse_base_on_e(attention_backend: str) -> bool:
    """Whether a backend's LSE is a natural logarithm (else base 2); KeyError for an unknown one."""
    return not adapter(attention_backend).base2


def dcp_a2a_lse_reduce(
    original: Callable[..., torch.Tensor],
    cp_attn_out: torch.Tensor,
    cp_attn_lse: torch.Tensor,
    cp_group: Group,
    is_lse_base_on_e: bool = True,
    cuda_graph_buffers: dict[str, torch.Tensor] | None = None,
    comm_backend: str = "a2a",
) -> torch.Tensor:
    """Out [B, H, D] and lse [B, H] of a KVP group -> this rank's heads [B, H/K, D].

    `fi_a2a` stays upstream's. `cuda_graph_buffers` is never passed by 0.5.23 and is not needed:
    buffers come from the graph's own memory pool.
    """
    if comm_backend == "fi_a2a":
        return original(
            cp_attn_out, cp_attn_lse, cp_group, is_lse_base_on_e, cuda_graph_buffers, comm_backend
        )
    return a2a(cp_attn_out, cp_attn_lse, cp_group, base2=not is_lse_base_on_e)[0]


def cp_lse_ag_out_rs_mha(
    cp_attn_out: torch.Tensor,
    cp_attn_lse: torch.Tensor,
    cp_group: Group,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Out [B, H, D] and natural-log lse [B, H] -> [B, H/K, D], with its lse when asked."""
    out, lse = ag_rs(cp_attn_out, cp_attn_lse, cp_group)
    return (out, lse) if return_lse else out


def cp_lse_ag_out_rs_mla(
    cp_attn_out: torch.Tensor,
    cp_attn_lse: torch.Tensor | Splits,
    cp_group: Group,
    ctx: Any = None,
    is_lse_base_on_e: bool = False,
) -> torch.Tensor:
    """Out [B, H, D] and lse [B, H] -> this rank's heads, heads first: [H/K, B, D].

    The model calls this for every backend that it does not know by name. One that can writes the
    heads first: what the value up-projection reads. `deferred` explains the form in which splits
    come here.
    """
    exchanger: Exchanger = cp_group.exchanger
    partial: Partial | Splits
    if isinstance(cp_attn_lse, Splits):
        partial, base2 = cp_attn_lse, False
    else:
        partial, base2 = Partial(cp_attn_out, cp_attn_lse), not is_lse_base_on_e
    out, _ = exchanger(partial, cp_attn_out.dtype, base2=base2, head_major=True)
    return out.transpose(0, 1)


def all_gather_q_for_mla_decode(
    q_nope_out: torch.Tensor, q_pe: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent [B, H/K, L] and rope part [B, H/K, R] of own queries -> those of the group's heads.

    Side by side in memory, the latent first, as kernels read them that take both as one.
    """
    queries = all_gather((q_nope_out, q_pe), get_parallel().dcp_group)
    latent = q_nope_out.shape[-1]
    return queries[..., :latent], queries[..., latent:]


def deferred(splits: Splits, q: torch.Tensor) -> tuple[torch.Tensor, Splits]:
    """Splits in the place of (out, lse), on their way through MLA's model code to the exchange.

    The model passes the second on as it is, and of the first needs shape [B, H, D] and dtype, which
    the queries [B, H, at least D] have. Whoever took the second for an LSE would fail at once.
    """
    return q[..., : splits.out.shape[-1]], splits
