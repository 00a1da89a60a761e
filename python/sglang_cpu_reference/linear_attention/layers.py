"""What stands around the states: short convolutions, projections cut up, gated norms."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sglang_cpu_reference.linear_attention.batch import requests, served


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor,
    has_initial_state: Tensor | None = None,
    activation: str | bool | None = "silu",
    **_: Any,
) -> Tensor:
    """The short convolution of a prefill: x [D, T], weight [D, W] -> [D, T].

    conv_states [slots, D, W - 1], read where has_initial_state [B] says so: a request's last
    inputs.
    """
    out = torch.zeros_like(x)
    for place, (tokens, slot) in enumerate(requests(query_start_loc, cache_indices)):
        state = conv_states[slot]
        before = state if has_initial_state is None or has_initial_state[place] else 0 * state
        inputs = torch.cat([before.to(x.dtype), x[:, tokens]], dim=-1)
        sums = functional.conv1d(
            inputs[None], weight[:, None].to(x.dtype), bias, groups=len(weight)
        )[0]
        out[:, tokens] = _activated(sums, activation)
        state.copy_(inputs[:, -state.shape[-1] :])
    return out


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    *,
    conv_state_indices: Tensor,
    pad_slot_id: int = -1,
    **drafts: Any,
) -> Tensor:
    """The short convolution of one token per request: x [B, D] -> [B, D]."""
    if x.dim() != 2 or any(value is not None for value in drafts.values()):
        raise NotImplementedError("the CPU reference convolves no draft tokens")
    out = torch.zeros_like(x)
    rows, slots = served(conv_state_indices)
    inputs = torch.cat([conv_state[slots].to(x.dtype), x[rows, :, None]], dim=-1)
    sums = (inputs * weight.to(x.dtype)).sum(-1) + (0 if bias is None else bias)
    out[rows] = _activated(sums, activation)
    conv_state[slots] = inputs[..., 1:].to(conv_state.dtype)
    return out


def _activated(x: Tensor, activation: str | bool | None) -> Tensor:
    return functional.silu(x) if activation else x


def split_qkvz_ba(
    mixed_qkvz: Tensor,
    mixed_ba: Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Qwen3-Next's projections, which stand key head by key head: (qkv [T, .], z, b, a)."""
    tokens, each = len(mixed_qkvz), num_heads_v // num_heads_qk
    widths = [head_qk, head_qk, each * head_v, each * head_v]
    *qkv, z = mixed_qkvz.view(tokens, num_heads_qk, sum(widths)).split(widths, dim=-1)
    b, a = (part.reshape(tokens, -1) for part in mixed_ba.view(tokens, -1, 2, each).unbind(2))
    return torch.cat([p.flatten(1) for p in qkv], 1), z.reshape(tokens, -1, head_v), b, a


def split_whole_qkvz_ba(
    mixed_qkvz: Tensor,
    mixed_ba: Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Qwen3.5's projections, which stand one after the other: as `split_qkvz_ba` returns."""
    values = num_heads_v * head_v
    qkv, z = mixed_qkvz.split([2 * num_heads_qk * head_qk + values, values], dim=-1)
    b, a = mixed_ba.chunk(2, dim=-1)
    return qkv.contiguous(), z.reshape(-1, num_heads_v, head_v), b.contiguous(), a.contiguous()


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """x [., D], normalized over D, times the activated gate g of the same shape."""
    assert bias is None
    assert residual is None
    assert not prenorm
    gate = g.float().sigmoid()
    gate = gate if activation == "sigmoid" else g.float() * gate
    return (functional.rms_norm(x.float(), weight.shape, weight.float(), eps) * gate).to(x.dtype)


def grouped_rms_norm_gated(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    is_rms_norm: bool = False,
    activation: str = "swish",
    **how: Any,
) -> Tensor:
    """`rms_norm_gated` by groups, before or after the gate z: SGLang's own torch reference."""
    from sglang.kernels.ops.attention.fla.layernorm_gated import rms_norm_ref

    assert is_rms_norm
    z = None if z is None else z.reshape(x.shape)
    if activation in ("swish", "silu") or z is None:
        return rms_norm_ref(x, weight, bias, z, **how)
    assert activation == "sigmoid"
    assert how.pop("norm_before_gate")
    return rms_norm_ref(x, weight, bias, **how) * z.sigmoid()
