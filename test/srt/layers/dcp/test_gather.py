"""Queries of all heads, from each rank's own: every bit, in the order and layout kernels read."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_helix.srt.layers.dcp import comm
from sglang_helix.srt.layers.dcp.gather import all_gather, joined

pytestmark = pytest.mark.quick


class Group:
    """Rank 0 of a group, told what the others bring."""

    def __init__(self, others: list[torch.Tensor]) -> None:
        self.others = others

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == 0
        assert x.is_contiguous()
        return torch.cat([x, *self.others])


def queries(ranks: int, T: int, own: int, width: int) -> list[torch.Tensor]:
    return [torch.randn(T, own, width) for _ in range(ranks)]


@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_own_heads_of_every_rank_in_order(ranks: int, T: int) -> None:
    each = queries(ranks, T, 2, 16)
    group = Group([q.transpose(0, 1) for q in each[1:]])
    assert torch.equal(all_gather((each[0],), group), torch.cat(each, dim=1))


@pytest.mark.parametrize("T", [1, 5])
def test_parts_of_mla_lie_side_by_side_latent_first(
    monkeypatch: pytest.MonkeyPatch, T: int
) -> None:
    """So that who wants them as one, and who wants them apart, finds them without a copy."""
    each = queries(3, T, 2, 24)
    group = Group([q.transpose(0, 1) for q in each[1:]])
    parallel: Any = SimpleNamespace(dcp_group=group)
    monkeypatch.setattr(comm, "get_parallel", lambda: parallel)
    latent, rope = comm.all_gather_q_for_mla_decode(each[0][..., :16], each[0][..., 16:])
    whole = torch.cat(each, dim=1)
    assert torch.equal(latent, whole[..., :16])
    assert torch.equal(rope, whole[..., 16:])
    # Upstream and adapters shape them by head.
    latent, rope = latent.reshape(-1, 6, 16), rope.reshape(T, 6, -1)
    one = joined(latent, rope)
    assert torch.equal(one, whole)
    assert one.data_ptr() == latent.data_ptr()


def test_parts_that_do_not_lie_so_are_put_together() -> None:
    whole = torch.arange(2 * 3 * 24.0).view(2, 3, 24)
    left, right = whole[..., :16], whole[..., 16:]
    for first, second in (
        (right, left),  # in the other order
        (left, right.clone()),
        (left, whole[..., 15:23]),
        (left[:1], right[1:]),
        (left[:, ::2], right[:, :2]),
        (left[..., ::2], right[..., ::2]),
    ):
        assert torch.equal(joined(first, second), torch.cat([first, second], -1))
    half = left.to(torch.float16)
    assert joined(half, right).dtype == torch.float32
    assert joined(left, right).data_ptr() == whole.data_ptr()
