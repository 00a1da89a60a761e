"""Weights by name where ranks share heads. Extends `model_runner_components/weight_exporter.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

logger = logging.getLogger(__name__)


def get_weights_by_name(
    original: Callable[..., Any], exporter: Any, name: str, truncate_size: int = 100
) -> Any:
    """Rows of a weight that this rank holds, as lists; None, which HTTP answers with 400.

    Upstream's models cut query, key and value out of the joint projection by N, and take a head's
    width from the hidden size; here the projection itself knows what it holds.
    """
    model = exporter.get_model()
    place = _place(model, name)
    if place is None or exporter._weight_export_unsupported_reason() is not None:
        return original(exporter, name, truncate_size)
    projection, part, kind = place
    if not isinstance(projection.quant_method, UnquantizedLinearMethod):
        logger.error("%s is packed by %s", name, type(projection.quant_method).__name__)
        return None
    query, key, value = (
        projection.q_proj_shard_size,
        projection.kv_proj_shard_size,
        projection.v_proj_shard_size,
    )
    rows = dict(zip("qkv", getattr(projection, kind).data.split((query, key, value)), strict=True))
    return rows[part].cpu().to(torch.float32).tolist()[:truncate_size]


def _place(model: Any, name: str) -> tuple[Any, str, str] | None:
    """(joint projection, q, k or v, weight or bias) of a name of the checkpoint, or None.

    Only for models that have the endpoint and a joint projection under that name.
    """
    if not hasattr(model, "get_weights_by_name"):
        return None
    for joint, separate, part in getattr(model, "stacked_params_mapping", ()):
        if separate in name and part in ("q", "k", "v"):
            path, _, kind = name.replace(separate, joint).rpartition(".")
            projection = dict(model.named_modules()).get(path)
            if (
                isinstance(projection, QKVParallelLinear)
                and getattr(projection, kind, None) is not None
            ):
                return projection, part, kind
    return None
