"""`benchmark.dcp collectives --op gather`: a layer's queries, from each rank's own heads to all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmark.dcp import report
from benchmark.dcp.collectives_rank import Bench, Candidate, Problem
from benchmark.dcp.kernels_stage import DTYPE

if TYPE_CHECKING:
    from sglang_helix.srt.layers.dcp.exchange import Exchanger

ROPE, NOPE = 64, 128  # of MLA's queries, which end with the rope part
KV_HEADS = 2  # behind the queries of GQA, in the projection's rows
SYMM = f"{report.OURS} symm gather"


@dataclass(frozen=True)
class Gather(Problem):
    """head_dim: of a whole query."""

    @property
    def link_bytes(self) -> int:
        return (self.ranks - 1) * self.batch * self.owned * self.head_dim * DTYPE.itemsize


class GatherBench(Bench):
    """Every bit is checked."""

    bound = 0.0

    def problem(self, shape: str, heads: int, head_dim: int, batch: int) -> Gather:
        width = head_dim + ROPE if shape == "mla" else head_dim
        return Gather(shape, heads, width, self.ranks, batch)

    def candidates(self, shape: str, heads: int, head_dim: int) -> list[Candidate]:
        """Ours by the kernel, and by the group's all-gather, as SGLang gathers those of MLA."""
        from sglang_helix.srt.layers.dcp.exchange import Exchanger
        from sglang_helix.srt.layers.dcp.gather import all_gather

        widths = (head_dim, ROPE) if shape == "mla" else (head_dim,)
        own, symm = heads // self.ranks, Exchanger("symm", self.ours)
        self.kept.append(symm)

        def gathered(exchanger: Exchanger | None, *made: torch.Tensor) -> torch.Tensor:
            self.ours.exchanger = exchanger
            return all_gather(parts(made, own, widths), self.ours)

        most = self.prepared(SYMM, partial(self.prepare_queries, symm, heads, widths))
        return [
            Candidate(f"{report.OURS} all-gather", self.ours, partial(gathered, None)),
            Candidate(SYMM, self.ours, partial(gathered, symm), most=most),
        ]

    def prepare_queries(self, symm: Exchanger, heads: int, widths: tuple[int, ...]) -> int:
        from sglang_helix.srt.layers.dcp.symm_layout import QueryLayout, largest_batch

        symm.prepare_queries(
            max_tokens=max(self.options.batch),
            num_heads=heads,
            widths=widths,
            dtype=DTYPE,
            timeout=self.options.timeout,
        )
        return largest_batch(QueryLayout(self.ranks, heads, widths, DTYPE, 0))

    def inputs(self, p: Problem) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What this rank's projections leave, and all ranks' queries in float64."""
        heads = []
        for rank in range(p.ranks):
            generator = torch.Generator(self.device).manual_seed(1000 * p.batch + rank)
            draw: Any = partial(torch.randn, device=self.device, dtype=DTYPE, generator=generator)
            if p.shape == "mla":
                latent = p.head_dim - ROPE
                made = (
                    draw((p.owned, p.batch, latent)),
                    draw((p.batch, p.owned, NOPE + ROPE)),
                )
                widths: tuple[int, ...] = (latent, ROPE)
            else:
                made = (draw((p.batch, (p.owned + 2 * KV_HEADS) * p.head_dim)),)
                widths = (p.head_dim,)
            heads.append(torch.cat(parts(made, p.owned, widths), dim=-1))
            if rank == self.rank:
                mine = made
        return mine, torch.cat(heads, dim=1).double()


def parts(
    made: tuple[torch.Tensor, ...], own: int, widths: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Queries [B, own, W_i] where a model has them: views of what it made."""
    if len(widths) == 1:
        [rows] = made
        return (rows[:, : own * widths[0]].unflatten(1, (own, -1)),)
    latents, queries = made
    return latents.transpose(0, 1), queries[..., NOPE:]
