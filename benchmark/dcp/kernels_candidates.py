"""Who does what in `benchmark.dcp kernels`: the candidates of each operation, what they move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from sglang_helix.srt.layers.dcp import exchange
from sglang_helix.srt.layers.dcp.lse_combine import combine, pack
from sglang_helix.srt.layers.dcp.packed_rows import packed_row_bytes, unpack

from benchmark.dcp.kernels_stage import (
    DTYPE,
    VARIANTS,
    Peers,
    Problem,
    StandIn,
    by_owner,
    merged,
    one_kernel,
    pack_as_sglang,
    packed_rows,
    random_partials,
)

VALUE = 128  # what w_vc makes of a head of MLA
SPLITS = 8  # of split-KV decoding, whose LSEs SGLang's GQA path reduces first


class Case(NamedTuple):
    """A candidate: what it runs, on which tensors, and what must come out."""

    run: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    want: torch.Tensor
    """The result in float64."""
    read: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    """Reads the result out of what ``run`` returns."""


Cases = Iterator[tuple[str, Case]]


def combine_cases(p: Problem, peers: Peers) -> Cases:
    x, lse = random_partials(p, p.ranks, p.owned)
    want = merged(x, lse)

    def helix(rows: torch.Tensor) -> torch.Tensor:
        return combine(*unpack(rows, p.head_dim, DTYPE))

    yield "helix", Case(helix, (packed_rows(x, lse, packed_row_bytes(p.head_dim, DTYPE)),), want)

    if kernels := peers.sglang_kernels:

        def sglang(rows: torch.Tensor) -> torch.Tensor:
            x, lse = rows.view(DTYPE)[..., : p.head_dim], rows.view(torch.float32)[..., -1]
            return kernels.dcp_lse_combine_triton(x, lse)[0]

        rows = packed_rows(x, lse, p.head_dim * DTYPE.itemsize + 4)
        yield "sglang", Case(sglang, (rows,), want)


def merge_cases(p: Problem, peers: Peers) -> Cases:
    x, lse = random_partials(p, p.ranks, p.owned)
    want = merged(x, lse)
    yield "helix", Case(combine, (x, lse), want)

    if kernels := peers.sglang_kernels:

        def sglang(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
            return kernels.dcp_lse_combine_triton(x, lse)[0]

        yield "sglang", Case(sglang, (x, lse), want)

    if library := peers.flashinfer:

        def flashinfer(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
            return library.merge_states(x, lse)[0]

        lanes = p.head_dim // max(8, p.head_dim // 32)  # threads that it gives a head
        if p.batch > p.ranks and p.owned * lanes > 1024:
            print(f"flashinfer.merge_states cannot: {p.owned} heads of {p.head_dim} in one block")
        else:
            by_token = x.transpose(0, 1), lse.transpose(0, 1) / math.log(2)
            yield "flashinfer", Case(flashinfer, by_token, want)


def pack_cases(p: Problem, peers: Peers) -> Cases:
    x, lse = (t[0] for t in random_partials(p, 1, p.heads))
    want = by_owner(x, p).double()

    def helix(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return pack(x, lse, p.ranks)

    yield "helix", Case(helix, (x, lse), want, lambda send: unpack(send, p.head_dim, DTYPE)[0])

    if sglang := peers.sglang_kernels:

        def sglang_pack(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
            return pack_as_sglang(sglang, x, lse, p.ranks)

        yield "sglang", Case(sglang_pack, (x, lse), want, lambda send: send[..., : p.head_dim])


def layer_cases(p: Problem, peers: Peers) -> Cases:
    x, lse = (t[0] for t in random_partials(p, 1, p.heads))
    # What the all-to-all stands in for leaves this rank its own rows, N owners' as N partials.
    wants = {"a2a": merged(by_owner(x, p), by_owner(lse, p)), "ag_rs": x[:, : p.owned].double()}
    # The other ranks of the all-gather weigh so little that rescaling in place changes nothing:
    # SGLang's GQA path does so, and repeated runs must not wear the numbers down.
    group = StandIn(torch.stack([lse, *[lse - 30] * (p.ranks - 1)]))

    def helix(reduce: exchange.Collective, x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return reduce(x, lse, group)[0]

    for name, expected in wants.items():
        yield (
            f"helix {name}",
            Case(partial(helix, exchange.BACKENDS[name].collective), (x, lse), expected),
        )

    if sglang := peers.sglang_comm:

        def a2a(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
            return sglang.dcp_a2a_lse_reduce(x, lse, group)

        def ag_rs_mla(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
            reduced = sglang.cp_lse_ag_out_rs_mla(x, lse, group, is_lse_base_on_e=True)
            return reduced.transpose(0, 1)

        def ag_rs_gqa(x: torch.Tensor, split_lses: torch.Tensor) -> torch.Tensor:
            # Its Triton backend comes by the LSE so, and asks attention for fp32.
            lse = torch.logsumexp(split_lses, dim=-1)
            return sglang.cp_lse_ag_out_rs_mha(x, lse, group).to(DTYPE)

        yield "sglang a2a", Case(a2a, (x, lse), wants["a2a"])
        if p.shape == "mla":
            yield "sglang ag_rs", Case(ag_rs_mla, (x, lse), wants["ag_rs"])
        else:
            split_lses = torch.full((*lse.shape, SPLITS), -math.inf, device=p.device)
            split_lses[..., 0] = lse
            yield "sglang ag_rs", Case(ag_rs_gqa, (x.float(), split_lses), wants["ag_rs"])


def exchange_cases(p: Problem, peers: Peers) -> Cases:
    x, lse = random_partials(p, p.ranks, p.heads)
    owners = zip(x.split(p.owned, 2), lse.split(p.owned, 2), strict=True)
    want = torch.cat([merged(*owned) for owned in owners])

    if peers.symm and p.device.type == "cuda":
        yield "helix symm", Case(one_kernel(p), (x.flatten(0, 1), lse.flatten(0, 1)), want)

    def for_chain(t: torch.Tensor) -> torch.Tensor:
        """[rank, B, owner * h, ...] -> [B, owner * rank * h, ...]: packs by owner, all at once."""
        return (
            by_owner(t.flatten(0, 1), p)
            .unflatten(1, (p.ranks, p.batch))
            .permute(2, 0, 1, *range(3, t.ndim + 1))
            .flatten(1, 3)
        )

    def received(t: torch.Tensor) -> torch.Tensor:
        """What was packed so, [owner, B, rank * h, ...] -> [rank, owner * B, h, ...]"""
        return t.unflatten(2, (p.ranks, p.owned)).movedim(2, 0).flatten(1, 2)

    def helix_a2a(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        send = pack(x, lse, p.ranks)
        partials, lses = unpack(torch.empty_like(send).copy_(send), p.head_dim, DTYPE)
        return combine(received(partials), received(lses))

    inputs = for_chain(x), for_chain(lse)
    yield "helix a2a", Case(helix_a2a, inputs, want)

    if sglang := peers.sglang_kernels:

        def sglang_a2a(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
            send = pack_as_sglang(sglang, x, lse, p.ranks)
            rows = torch.empty_like(send).copy_(send)
            partials, lses = rows[..., : p.head_dim], rows.view(torch.float32)[..., -1]
            return sglang.dcp_lse_combine_triton(received(partials), received(lses))[0]

        yield "sglang a2a", Case(sglang_a2a, inputs, want)


def variants_cases(p: Problem, peers: Peers) -> Cases:
    if not peers.symm or p.device.type != "cuda":
        return
    x, lse = random_partials(p, p.ranks, p.heads)
    owners = zip(x.split(p.owned, 2), lse.split(p.owned, 2), strict=True)
    want = torch.cat([merged(*owned) for owned in owners])
    inputs = x.flatten(0, 1), lse.flatten(0, 1)
    yield "helix symm", Case(one_kernel(p), inputs, want)
    for name, variant in VARIANTS.items():
        yield f"helix symm, {name}", Case(one_kernel(p, **variant), inputs, want)


def project(latents: torch.Tensor, w_vc: torch.Tensor) -> torch.Tensor:
    """[B, h, D] by w_vc [h, D, V] -> values [B, h, V]."""
    return torch.bmm(latents.transpose(0, 1), w_vc).transpose(0, 1)


def values_cases(p: Problem, peers: Peers) -> Cases:
    if p.shape != "mla":
        return
    x, lse = random_partials(p, p.ranks, p.heads)
    w_vc = torch.randn((p.heads, p.head_dim, VALUE), dtype=DTYPE, device=p.device)
    w_vc = (w_vc / p.head_dim**0.5).to(DTYPE)
    own = w_vc[: p.owned].clone()
    projected = torch.einsum("nbhd,hdv->nbhv", x.double(), w_vc.double())

    if peers.symm and p.device.type == "cuda":
        want = merged(projected[:, :, : p.owned], lse[:, :, : p.owned])
        wide, narrow = one_kernel(p), one_kernel(replace(p, head_dim=VALUE))

        def symm_projected_behind(
            x: torch.Tensor, lse: torch.Tensor, own: torch.Tensor
        ) -> torch.Tensor:
            return project(wide(x, lse)[: p.batch], own)

        def symm_projected_before(
            x: torch.Tensor, values: torch.Tensor, lse: torch.Tensor, w_vc: torch.Tensor
        ) -> torch.Tensor:
            # This rank's among those that all have projected.
            torch.bmm(x.transpose(0, 1), w_vc, out=values[: p.batch].transpose(0, 1))
            return narrow(values, lse)[: p.batch]

        everyones = lse.flatten(0, 1)
        yield (
            "helix symm, projected behind",
            Case(symm_projected_behind, (x.flatten(0, 1), everyones, own), want),
        )
        inputs = x[0], projected.flatten(0, 1).to(DTYPE), everyones, w_vc
        yield "helix symm, projected before", Case(symm_projected_before, inputs, want)

    group = StandIn(lse)
    partials, lses = by_owner(x[0], p), by_owner(lse[0], p)

    def a2a_projected_behind(x: torch.Tensor, lse: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return project(exchange.a2a(x, lse, group).out, own)

    def a2a_projected_before(
        x: torch.Tensor, lse: torch.Tensor, w_vc: torch.Tensor
    ) -> torch.Tensor:
        return exchange.a2a(project(x, w_vc), lse, group).out

    want = torch.einsum("bhd,hdv->bhv", merged(partials, lses), own.double())
    yield "helix a2a, projected behind", Case(a2a_projected_behind, (x[0], lse[0], own), want)
    want = merged(by_owner(projected[0], p), lses)
    yield "helix a2a, projected before", Case(a2a_projected_before, (x[0], lse[0], w_vc), want)


def moved_bytes(op: str, p: Problem) -> int:
    """Bytes that an operation must read and write: inputs once, outputs once."""
    partials, result = p.rows(p.heads), p.payload(p.owned)
    if op == "pack":
        return 2 * partials
    if op in ("combine", "merge"):
        return partials + result
    # Read where attention left it, written where its owner reads it, read there, combined.
    one_rank = 3 * partials + result
    return p.ranks * one_rank if op in ALL_RANKS else one_rank


def fits(op: str, p: Problem) -> bool:
    """Whether the device holds `exchange`'s buffers, all candidates' and all N ranks'.

    In units of one rank's partials times N: 2 to copy from, 5 in the candidates' hands, 4 that the
    chains allocate, 6 in workspaces, 3 to copy, 1 for what is left; a call moves 3.
    """
    if op not in ALL_RANKS or p.device.type != "cuda":
        return True
    memory = torch.cuda.get_device_properties(p.device).total_memory
    return 7 * moved_bytes(op, p) < memory


OPERATIONS = {
    "combine": combine_cases,
    "merge": merge_cases,
    "pack": pack_cases,
    "layer": layer_cases,
    "exchange": exchange_cases,
    "values": values_cases,
    "variants": variants_cases,
}
# Those in which one device plays all ranks.
ALL_RANKS = ("exchange", "values", "variants")
# Not of the full run.
ASKED_FOR = ("variants",)
