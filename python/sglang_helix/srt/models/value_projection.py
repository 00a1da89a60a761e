"""MLA's value projection before the exchange, where the batch pays for it.

Absorbed attention leaves a latent of 512 for each head, which w_vc projects to a value of 128. The
projection is linear, and the merge over the ranks weighs whole heads: so each rank may project its
partial results, and then a quarter of the bytes is exchanged. For that it holds w_vc of the whole
group's heads (`replicas`), and reads K times as much of it: at a few tokens that costs more than
the bytes it saves. So batches go this way from a size on (`value_switch`), smaller ones as before.
The size of a batch is the same on every rank, and that of a captured graph is fixed.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.logits_processor import get_in_autotune_dummy_run
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla import (
    _apply_attention_output_gate,
)
from sglang.srt.runtime_context import get_parallel

from sglang_helix.srt.layers.attention.adapters import adapter
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits
from sglang_helix.srt.layers.dcp.partial import Partial, Splits
from sglang_helix.srt.models.value_switch import switch


def comes_first(layer: Any, forward_batch: Any, tokens: int) -> bool:
    """Whether a layer projects a pass of so many tokens before the exchange."""
    return (
        getattr(layer, "w_vc_rep", None) is not None
        and switch().pays(tokens)
        and layer.is_dcp_mla_decode_phase(forward_batch)
        and not get_in_autotune_dummy_run()
    )


def forward(
    layer: Any,
    q_pe: torch.Tensor,
    k_pe: torch.Tensor,
    q_nope_out: torch.Tensor,
    k_nope: torch.Tensor,
    forward_batch: Any,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """Absorbed attention of decode or a verify pass, from the queries to the layer's output.

    Args:
        q_pe, q_nope_out: [T, H, rope] and [T, H, latent] of all the group's heads, scaled by
            position where the model does that.
        k_pe, k_nope: of the new tokens.
        gate: of the model's own heads; see `_apply_attention_output_gate`.
    """
    fused: dict[str, Any] = {}
    if q_pe is not None and layer._fuse_rope_for_trtllm_mla(forward_batch):
        rotary = layer.rotary_emb
        fused = {"cos_sin_cache": rotary.cos_sin_cache, "is_neox": rotary.is_neox_style}
    attend = layer.attn_mqa_for_dcp_decode
    latents, lse = attend(
        q_nope_out, k_nope, k_nope, forward_batch, q_rope=q_pe, k_rope=k_pe, **fused
    )
    base2 = adapter(layer.current_attention_backend).base2
    values = own_values(latents, lse, layer.w_vc_rep, get_parallel().dcp_group.exchanger, base2)
    if gate is not None:
        values = _apply_attention_output_gate(layer, values, gate)
    output, _ = layer.o_proj(values)
    return output


def own_values(
    latents: torch.Tensor,
    lse: torch.Tensor | Splits,
    w_vc: torch.Tensor,
    exchanger: Exchanger,
    base2: bool,
) -> torch.Tensor:
    """Project partial results and exchange them: this rank's own heads, [T, H/K * value].

    Args:
        latents: [T, H * latent], in any form; where `lse` is splits, these have the results.
        lse: [T, H] fp32, or what `comm.deferred` puts in its place.
        w_vc: [H, latent, value] of the group's heads.
        base2: the LSE is a base-2 logarithm; that of splits is natural.
    """
    if isinstance(lse, Splits):
        partial, base2 = combine_splits(lse, w_vc.dtype), False
    else:
        partial = Partial(latents.view(-1, *w_vc.shape[:2]).to(w_vc.dtype), lse)
    projected = torch.bmm(partial.out.transpose(0, 1), w_vc).transpose(0, 1)
    values, _ = exchanger(Partial(projected, partial.lse), base2=base2)
    return values.flatten(1)
