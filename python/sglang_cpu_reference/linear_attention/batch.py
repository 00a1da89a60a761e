"""What a batch's requests are: their tokens, their slots, which states are kept of them."""

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def requests(cu_seqlens: Tensor, slots: Tensor) -> Iterator[tuple[slice, int]]:
    """Tokens and slot of every request that is not padding."""
    bounds = cu_seqlens.tolist()
    for (start, stop), slot in zip(itertools.pairwise(bounds), slots.tolist(), strict=True):
        if slot >= 0 and stop > start:
            yield slice(start, stop), slot


def served(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a decode batch that are not padding, and their slots."""
    rows = (slots >= 0).nonzero()[:, 0]
    return rows, slots[rows].long()


def check_known(how: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise NotImplementedError for arguments that would change what is computed."""
    if how != {name: value for name, value in known.items() if name in how}:
        raise NotImplementedError(f"the CPU reference computes {known} alone, not {how}")


def track_states(
    conv_states: Tensor,
    ssm_states: Tensor,
    cache_indices: Tensor,
    mamba_track_mask: Tensor,
    mamba_track_indices: Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
    *,
    dim: int = 0,
) -> None:
    """Copy the states of the requests of the mask [B] to their track slots, along a dimension."""
    rows = mamba_track_mask[:batch_size] & (cache_indices[:batch_size] >= 0)
    source, target = (
        indices[:batch_size][rows].long() for indices in (cache_indices, mamba_track_indices)
    )
    for states in (conv_states, ssm_states):
        states.index_copy_(dim, target, states.index_select(dim, source))


def track_states_of_all_layers(*args: Any, **kwargs: Any) -> None:
    """`track_states` of pools [layers, slots, ...]."""
    track_states(*args, **kwargs, dim=1)
