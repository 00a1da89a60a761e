"""LongCat's experts that give back their input. Extends `models/longcat_flash.py`.

What they give is added to a rank's part of the experts' output, which is then summed up over all N
ranks: N times as much. And the factor of routed experts is left off it. Both change the answers,
sharded or not; over a sharded cache each rank adds its share, with the factor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.moe.utils import get_moe_a2a_backend
from torch import nn


def share_identity_experts(model: nn.Module, ranks: int) -> None:
    """Let each of N ranks weigh the identity experts of a built model by its share."""
    # Where tokens go to the ranks of their experts, nothing is summed up.
    summed = ranks if get_moe_a2a_backend().is_none() else 1
    experts: Any
    for experts in model.modules():
        if getattr(experts, "zero_expert_num", 0):
            share = experts.routed_scaling_factor / summed
            topk = experts.topk
            topk.forward = partial(_shared, topk.forward, experts.num_experts, share)


def _shared(
    choose: Callable[..., Any], experts: int, share: float, *args: Any, **kwargs: Any
) -> Any:
    """The experts chosen, those behind the first so many weighed by a share of their weight."""
    chosen = choose(*args, **kwargs)
    weights = torch.where(
        chosen.topk_ids < experts, chosen.topk_weights, chosen.topk_weights * share
    )
    return chosen._replace(topk_weights=weights)
