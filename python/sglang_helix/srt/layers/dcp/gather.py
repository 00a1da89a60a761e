"""Queries of a KVP group's heads, from those of each rank's own: what seam 3 is asked with.

A rank's queries are one tensor for GQA and two for MLA (the latent and the rope part), which
kernels of MLA want side by side or apart. So they are gathered side by side, and the parts are
views of what stands in order then. Where the exchange has a kernel prepared for them, that is one
launch, from where they lie; else it is the group's all-gather, heads in front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def all_gather(parts: tuple[Tensor, ...], group: Any, layer: int = -1) -> Tensor:
    """Each rank's parts [T, H/K, W_i] of a query -> queries of all heads [T, H, sum W_i].

    Collective over the group, a GroupCoordinator. By the all-gather it takes one copy, to bring
    the heads to the front, and none of what was gathered: the result is a view of [H, T, sum W_i].

    layer: that they are of, which a stuck kernel is reported with; -1: unknown.
    """
    exchanger = getattr(group, "exchanger", None)  # fi_a2a has none
    if exchanger is not None and (queries := exchanger.gathered(parts, layer)) is not None:
        assert isinstance(queries, Tensor)
        return queries
    heads_first = [part.transpose(0, 1) for part in parts]
    own = heads_first[0].contiguous() if len(parts) == 1 else torch.cat(heads_first, dim=-1)
    gathered: Tensor = group.all_gather(own, dim=0)
    return gathered.transpose(0, 1)


def joined(left: Tensor, right: Tensor) -> Tensor:
    """Two parts [..., V] and [..., W] as [..., V + W]: a view, if they stand side by side."""
    *shape, width = left.shape
    steps = list(zip(left.shape, left.stride(), right.stride(), strict=True))
    side_by_side = (
        left.dtype == right.dtype
        and right.shape[:-1] == left.shape[:-1]
        and left.stride(-1) == right.stride(-1) == 1
        and all(one == other for size, one, other in steps if size > 1)
        and right.untyped_storage().data_ptr() == left.untyped_storage().data_ptr()
        and right.storage_offset() == left.storage_offset() + width
    )
    if side_by_side:
        return left.as_strided((*shape, width + right.shape[-1]), left.stride())
    return torch.cat([left, right], dim=-1)
