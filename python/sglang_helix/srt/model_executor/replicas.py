"""MLA's query weights of a whole KVP group on each of its ranks. Extends `model_runner.py`.

Upstream gathers them after the KV pool is sized, so their memory is missing from the account; it
warns and serves without them where it cannot gather; and it never renews them when weights are
updated. Here they are gathered as soon as the model is loaded, a model that cannot have them is
refused where they were asked for, and `weight_updater` renews them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_executor.model_runner import _gather_block_fp8_linear, _is_block_fp8
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA
from sglang.srt.runtime_context import get_parallel

from sglang_helix.srt.compatibility.situation import attn_tp_size_of

logger = logging.getLogger(__name__)

_FULL_PRECISION = (torch.bfloat16, torch.float16, torch.float32)


class ReplicationRefusedError(ValueError):
    """The query projection cannot be replicated; the message says why and what to do."""


def replicate_q_proj(model: torch.nn.Module, *, required: bool) -> None:
    """Give every MLA layer the query weights of its whole KVP group, from its ranks' shards.

    Where a layer's quantization allows no replica, raises ReplicationRefusedError if `required`,
    else leaves that layer to gather its queries.
    """
    for name, layer in layers(model):
        if (reason := obstacle(layer)) is None:
            renew(layer)
        elif required:
            raise ReplicationRefusedError(refusal(name, reason))
        else:
            logger.info("%s gathers its queries: %s", name, reason)


def layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Every MLA layer that decodes in absorbed form, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, DeepseekV2AttentionMLA) and layer.w_kc is not None:
            yield name, layer


def obstacle(layer: Any) -> str | None:
    """Why a layer's query projection cannot be replicated; None where it can."""
    projection = _projection(layer)
    plain = isinstance(projection.quant_method, UnquantizedLinearMethod)
    if layer.w_kc.dtype in _FULL_PRECISION and (plain or _is_block_fp8(projection)):
        return None
    return (
        f"it is quantized by {type(projection.quant_method).__name__}, with {layer.w_kc.dtype} "
        "absorbed weights"
    )


def refusal(name: str, reason: str) -> str:
    """What the user reads about a layer that cannot have the replica that was asked for."""
    return (
        f"the query projection of {name} cannot be replicated: {reason}. Give "
        "--no-dcp-replicate-q-proj, with which queries are gathered, in place of "
        "--dcp-replicate-q-proj or beside --attn-tp-size."
    )


def renew(layer: Any) -> None:
    """Gather a layer's replica from the ranks of its KVP group, all of which call this.

    The first call allocates. Later ones fill the same tensors, whose addresses captured graphs
    hold.
    """
    group, projection = get_parallel().dcp_group, _projection(layer)
    if isinstance(projection.quant_method, UnquantizedLinearMethod):
        weight = group.all_gather(projection.weight.data, dim=0)
        layer.q_b_proj_qrep_weight = _renewed(layer.q_b_proj_qrep_weight, weight)
    else:
        replica = _gather_block_fp8_linear(projection, group)
        if layer.q_b_proj_qrep is None:
            layer.q_b_proj_qrep = replica
        else:
            layer.q_b_proj_qrep.load_state_dict(replica.state_dict())
    layer.w_kc_qrep = _renewed(layer.w_kc_qrep, group.all_gather(layer.w_kc.contiguous(), dim=0))


def drop(layer: Any) -> None:
    """Leave a layer to gather its queries."""
    layer.w_kc_qrep = layer.q_b_proj_qrep_weight = layer.q_b_proj_qrep = None


def is_current(layer: Any, group: Any) -> bool:
    """Whether this rank's part of a layer's replica is still what this rank holds."""
    replica = layer.q_b_proj_qrep_weight
    if replica is None:
        replica = layer.q_b_proj_qrep.weight
    return all(
        _same_bytes(whole.chunk(group.world_size)[group.rank_in_group], own)
        for whole, own in ((replica, _projection(layer).weight), (layer.w_kc_qrep, layer.w_kc))
    )


def asked_for(server_args: Any) -> bool:
    """Whether the user asked for replicas; for some models SGLang turns them on by itself."""
    asked = server_args._raw_input.get("dcp_replicate_q_proj")
    return bool(asked) or (asked is None and attn_tp_size_of(server_args) is not None)


def _projection(layer: Any) -> Any:
    return layer.q_b_proj if layer.has_q_b_proj else layer.q_proj


def _renewed(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if old is None else old.copy_(new)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
