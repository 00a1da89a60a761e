"""MiniMax-M2's norms over the heads of all ranks, upstream Triton kernels, in plain torch.

Queries q [T, D], keys k [T, E], of this rank; between the two the ranks add up their sums.
"""

import torch


def install_in_rank() -> None:
    """Where the model is imported anyway, and nowhere else."""
    from sglang.srt.models import minimax_m2

    minimax_m2.rms_sumsq_serial = sums_of_squares
    minimax_m2.rms_apply_serial = normed_over_ranks


def sums_of_squares(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``rms_sumsq_serial``: [2 T] of the T rows of q, then of k, in fp32."""
    return torch.cat([rows.float().square().sum(-1) for rows in (q, k)])


def normed_over_ranks(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    sum_sq: torch.Tensor,
    tp_world: int = 1,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, ...]:
    """``rms_apply_serial``: the norms by the sums of all ranks."""
    return tuple(
        (rows.float() * (sums[:, None] / rows.shape[1] / tp_world + eps).rsqrt() * weight).to(
            rows.dtype
        )
        for rows, weight, sums in zip((q, k), (q_weight, k_weight), sum_sq.chunk(2), strict=True)
    )
