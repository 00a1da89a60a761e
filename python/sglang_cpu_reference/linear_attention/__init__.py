"""Recurrent states of hybrid models, upstream's Triton kernels, in plain torch, token by token.

What stands in the place of a kernel takes its arguments and leaves behind what it leaves; a
request whose slot is negative is padding. States and sums are fp32, whatever comes in. Shapes:
T tokens of a batch, request after request as cu_seqlens says, or B requests with one token each;
H key heads of K elements, HV value heads of V elements, a multiple of H.
"""

import os
from collections.abc import Callable
from typing import Any

from sglang_cpu_reference.linear_attention.batch import track_states, track_states_of_all_layers
from sglang_cpu_reference.linear_attention.delta_rule import (
    chunk_gated_delta_rule,
    chunk_kda,
    gdn_gating,
    gdn_packed_decode,
    kda_packed_decode,
)
from sglang_cpu_reference.linear_attention.layers import (
    causal_conv1d_fn,
    causal_conv1d_update,
    grouped_rms_norm_gated,
    rms_norm_gated,
    split_qkvz_ba,
    split_whole_qkvz_ba,
)
from sglang_cpu_reference.linear_attention.lightning import lightning
from sglang_cpu_reference.linear_attention.mamba2 import ssd_decode, ssd_scan

_KERNELS = "sglang.kernels.ops"


def install() -> None:
    """Keep the convolutions' last inputs in fp32, as models are served here; upstream: bf16."""
    os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")


def install_in_rank() -> None:
    """Name the convolutions where SGLang imports them for the platforms that it knows alone."""
    from sglang.srt.layers.attention.mamba import mamba

    for suffix in ("", "_triton"):
        setattr(mamba, f"causal_conv1d_fn{suffix}", causal_conv1d_fn)
        setattr(mamba, f"causal_conv1d_update{suffix}", causal_conv1d_update)


REPLACED: dict[str, Callable[..., Any]] = {
    f"{_KERNELS}.mamba.causal_conv1d_triton.causal_conv1d_fn": causal_conv1d_fn,
    f"{_KERNELS}.mamba.causal_conv1d_triton.causal_conv1d_update": causal_conv1d_update,
    f"{_KERNELS}.mamba.mamba_state_scatter_triton.track_mamba_states_if_needed": track_states,
    f"{_KERNELS}.mamba.mamba_state_scatter_triton.track_mamba_states_all_layers": (
        track_states_of_all_layers
    ),
    f"{_KERNELS}.attention.linear.fused_gdn_gating.fused_gdn_gating": gdn_gating,
    f"{_KERNELS}.attention.fla.chunk.chunk_gated_delta_rule": chunk_gated_delta_rule,
    f"{_KERNELS}.attention.fla.fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode": (
        gdn_packed_decode
    ),
    f"{_KERNELS}.attention.fla.fused_recurrent.fused_recurrent_kda_packed_decode": (
        kda_packed_decode
    ),
    f"{_KERNELS}.attention.fla.kda.chunk_kda": chunk_kda,
    f"{_KERNELS}.mamba.triton_ops.ssd_combined.mamba_chunk_scan_combined": ssd_scan,
    f"{_KERNELS}.mamba.triton_ops.mamba_ssm.selective_state_update": ssd_decode,
    f"{_KERNELS}.attention.linear.seg_la.seg_la_fwd": lightning,
    f"{_KERNELS}.attention.fla.fused_norm_gate.rms_norm_gated": rms_norm_gated,
    f"{_KERNELS}.attention.fla.layernorm_gated.rms_norm_gated": grouped_rms_norm_gated,
    f"{_KERNELS}.attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat": split_qkvz_ba,
    f"{_KERNELS}.attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous": (
        split_whole_qkvz_ba
    ),
}
