"""`benchmark.dcp collectives --op values`: the value projection of MLA, and the exchange."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmark.dcp import report
from benchmark.dcp.collectives_rank import Bench, Candidate, Problem
from benchmark.dcp.kernels_candidates import VALUE, project
from benchmark.dcp.kernels_stage import DTYPE

if TYPE_CHECKING:
    from sglang_helix.srt.layers.dcp.exchange import Exchanger

EXCHANGES = ("symm", "a2a")


class ValuesBench(Bench):
    """From partial latents of all heads to the values of a rank's own, as a layer of decode."""

    sets = 16
    """More than the L2 holds of w_vc: a layer reads its own, which no other layer has read."""

    def candidates(self, shape: str, heads: int, head_dim: int) -> list[Candidate]:
        """Each exchange with w_vc of a rank's heads behind it, and of the group's before it."""
        from sglang_helix.srt.layers.dcp.exchange import Exchanger
        from sglang_helix.srt.layers.dcp.partial import Partial
        from sglang_helix.srt.models.value_projection import own_values

        owned = heads // self.ranks
        own = slice(self.rank * owned, (self.rank + 1) * owned)

        def behind(
            exchanger: Exchanger, x: torch.Tensor, lse: torch.Tensor, w_vc: torch.Tensor
        ) -> torch.Tensor:
            return project(exchanger(Partial(x, lse), head_major=True).out, w_vc[own])

        def before(
            exchanger: Exchanger, x: torch.Tensor, lse: torch.Tensor, w_vc: torch.Tensor
        ) -> torch.Tensor:
            return own_values(x, lse, w_vc, exchanger, base2=False).unflatten(1, (owned, VALUE))

        found = []
        for name in EXCHANGES:
            exchanger = Exchanger(name, self.ours)
            self.kept.append(exchanger)
            most = None
            if exchanger.backend.kernel:
                prepare = partial(self.prepare_both, exchanger, heads, (head_dim, VALUE))
                most = self.prepared(f"{report.OURS} {name}", prepare)
            found += [
                Candidate(
                    f"{report.OURS} {name}, projected {order}",
                    self.ours,
                    partial(run, exchanger),
                    most=most,
                    head_dim=sent,
                )
                for order, run, sent in (("behind", behind, head_dim), ("before", before, VALUE))
            ]
        return found

    def prepare_both(self, symm: Exchanger, heads: int, widths: tuple[int, ...]) -> int:
        return min(self.prepare_symm(symm, heads, width) for width in widths)

    def inputs(self, p: Problem) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """This rank's latents, their LSEs, and w_vc [H, D, V]; and its values in float64."""
        (x, lse), combined = super().inputs(p)
        generator = torch.Generator(self.device).manual_seed(p.heads)
        draw: Any = partial(torch.randn, device=self.device, generator=generator)
        w_vc = (draw((p.heads, p.head_dim, VALUE)) / p.head_dim**0.5).to(DTYPE)
        own = w_vc[self.rank * p.owned : (self.rank + 1) * p.owned]
        return (x, lse, w_vc), torch.einsum("bhd,hdv->bhv", combined, own.double())
