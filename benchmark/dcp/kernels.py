"""The kernels of the exchange beside their peers, on one device.

    python -m benchmark.dcp kernels                              the full run, on a GPU
    python -m benchmark.dcp kernels --device cpu --batch 1 2     a small one, anywhere

Six operations, for N ranks that share H heads (each ends with h = H/N of them), batch B:

    combine   packed rows of N partial outputs of h heads, each with its LSE -> their combination
    merge     the same from separate tensors of outputs and LSEs
    pack      one partial output of H heads and its LSE -> the send layout
    layer     all that one rank launches between attention and o_proj. A collective is stood in for
              by a copy of what it leaves on the rank, a lower bound on its time
    exchange  the same for all N ranks at once, which one device plays: the one-kernel exchange
              beside the chains of launches over the same bytes. No link is crossed here
    values    MLA's value projection and the exchange of one rank, in both orders: a2a as in
              `layer`, the one kernel as in `exchange`, which has all N ranks' work in it

Every candidate gets the same numbers in the layout it wants, and its poisoned output is checked
against float64 before it is timed. `copy` is a device-to-device copy that moves as many bytes as
the operation must. Peers are SGLang's and FlashInfer's own functions, where they can be imported.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sglang_helix.srt.layers.dcp import exchange
from sglang_helix.srt.layers.dcp.lse_combine import combine, pack
from sglang_helix.srt.layers.dcp.packed_rows import packed_row_bytes, unpack

from benchmark.dcp import measure, report

DTYPE = torch.bfloat16
BOUND = 4e-3  # relative error of bf16 results
VALUE = 128  # what w_vc makes of a head of MLA
SPLITS = 8  # of split-KV decoding, whose LSEs SGLang's GQA path reduces first


@dataclass(frozen=True)
class Problem:
    shape: str
    heads: int
    head_dim: int
    ranks: int
    batch: int
    device: torch.device

    @property
    def owned(self) -> int:
        """Heads that a rank ends with: h."""
        return self.heads // self.ranks

    def rows(self, heads: int) -> int:
        """Bytes of a batch of rows, payload and LSE."""
        return self.batch * heads * (self.head_dim * DTYPE.itemsize + 4)

    def payload(self, heads: int) -> int:
        return self.batch * heads * self.head_dim * DTYPE.itemsize


SHAPES = {"mla": (128, 512), "gqa": (64, 128)}


class Case(NamedTuple):
    """A candidate: what it runs, on which tensors, and what must come out."""

    run: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    want: torch.Tensor
    """The result in float64."""
    read: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    """Reads the result out of what ``run`` returns."""


Cases = Iterator[tuple[str, Case]]


# --- what is measured ---------------------------------------------------------------------------


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


def values_cases(p: Problem, peers: Peers) -> Cases:
    if p.shape != "mla":
        return
    x, lse = random_partials(p, p.ranks, p.heads)
    w_vc = torch.randn((p.heads, p.head_dim, VALUE), dtype=DTYPE, device=p.device)
    w_vc = (w_vc / p.head_dim**0.5).to(DTYPE)
    own = w_vc[: p.owned].clone()
    projected = torch.einsum("nbhd,hdv->nbhv", x.double(), w_vc.double())

    def project(out: torch.Tensor, w_vc: torch.Tensor) -> torch.Tensor:
        return torch.bmm(out.transpose(0, 1), w_vc).transpose(0, 1)

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
}
# Those in which one device plays all ranks.
ALL_RANKS = ("exchange", "values")


# --- what they need -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Peers:
    """Modules that could be imported, else None."""

    sglang_kernels: Any = None
    sglang_comm: Any = None
    flashinfer: Any = None
    symm: Any = None


def find_peers(device: torch.device) -> Peers:
    """Import what runs on the device, and say what does not."""
    names = {
        "sglang_kernels": "sglang.kernels.ops.attention.dcp_kernels",
        "sglang_comm": "sglang.srt.layers.dcp.comm",
        "flashinfer": "flashinfer",
        "symm": "sglang_helix.srt.layers.dcp.symm",
    }
    if device.type != "cuda":
        print(f"not measured, for want of a CUDA device: {', '.join(names.values())}")
        return Peers()
    found = {}
    for field, name in names.items():
        try:
            found[field] = import_module(name)
        except ImportError as error:
            print(f"not measured: {name} ({error})")
    return Peers(**found)


class StandIn:
    """A rank's process group whose collectives are copies of what they leave on the rank."""

    rank_in_group = 0

    def __init__(self, lses: torch.Tensor) -> None:
        self.lses = lses
        self.world_size = len(lses)

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        output.copy_(input)

    def all_gather(self, input: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The only gather in these chains is of LSEs."""
        gathered = torch.empty_like(self.lses)
        self.all_gather_into_tensor(gathered, input)
        return gathered.view(-1, *input.shape[1:])

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        output.copy_(self.lses)

    def all_reduce(self, input: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(input).copy_(input)

    def reduce_scatter_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        output.copy_(input[: len(output)])

    def reduce_scatter_along_dim(self, input: torch.Tensor, dim: int = 0) -> torch.Tensor:
        output = input.new_empty(len(input) // self.world_size, *input.shape[1:])
        self.reduce_scatter_tensor(output, input)
        return output


def one_kernel(p: Problem) -> Callable[..., torch.Tensor]:
    """The one-kernel exchange of [N * B, H, D] with all ranks on this device."""
    from sglang_helix.srt.layers.dcp import symm_launch, symm_layout, symm_workspace
    from sglang_helix.srt.layers.dcp.partial import Partial

    layout = symm_layout.Layout(p.ranks, p.heads, p.head_dim, DTYPE, p.batch)
    workspace = symm_workspace.one_device(layout, p.device)

    def run(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return symm_launch.exchange(workspace, Partial(x, lse)).out

    return run


def random_partials(p: Problem, shards: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = (shards, p.batch, heads)
    x = torch.randn((*size, p.head_dim), dtype=DTYPE, device=p.device)
    return x, 3 * torch.randn(size, device=p.device)


def merged(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The combination of [N, B, h, D] in float64."""
    weight = lse.double().softmax(0)[..., None]
    return sum(w * part.double() for w, part in zip(weight, x, strict=True))


def by_owner(x: torch.Tensor, p: Problem) -> torch.Tensor:
    """[B, H, ...] -> [N, B, h, ...]"""
    return x.view(len(x), p.ranks, p.owned, *x.shape[2:]).transpose(0, 1)


def packed_rows(x: torch.Tensor, lse: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [N, B, h, width]: each row's payload and behind it the LSE."""
    rows = torch.zeros((*lse.shape, width), dtype=torch.uint8, device=x.device)
    size = x.shape[-1] * x.element_size()
    rows[..., :size] = x.view(torch.uint8)
    rows[..., size : size + 4] = lse[..., None].view(torch.uint8)
    return rows


def pack_as_sglang(kernels: Any, x: torch.Tensor, lse: torch.Tensor, ranks: int) -> torch.Tensor:
    """SGLang's send layout: rows of D + 2 elements, the last two of which are the LSE's bits."""
    B, H, D = x.shape
    send = x.new_empty((ranks, B, H // ranks, D + 2))
    kernels.dcp_pack_a2a_send(x, lse, send[..., :D], send.view(torch.float32)[..., -1])
    return send


# --- running ------------------------------------------------------------------------------------


LaunchCounts = dict[tuple[str, str, str], int | None]


def measure_problem(
    op: str, p: Problem, peers: Peers, samples: int, launch_counts: LaunchCounts
) -> list[report.Row]:
    moved = moved_bytes(op, p)
    sets = measure.sets_to_rotate(p.device, moved)
    rotations: dict[str, measure.Rotation] = {}
    errors: dict[str, float | None] = {}
    for name, case in OPERATIONS[op](p, peers):
        rotated = [
            x.expand(sets, *x.shape).clone(memory_format=torch.contiguous_format)
            for x in case.inputs
        ]
        calls = [partial(case.run, *inputs) for inputs in zip(*rotated, strict=True)]
        rotations[name] = measure.Rotation(calls, p.device)
        outputs = [case.read(out) for out in rotations[name].checked_outputs()]
        error = max(relative_error(out, case.want) for out in outputs)
        if not error <= BOUND:
            raise AssertionError(f"{op} by {name} at {p}: relative error {error}")
        errors[name] = error
        if (op, p.shape, name) not in launch_counts:
            launch_counts[op, p.shape, name] = measure.launches(calls[0])
    if not rotations:
        return []
    source = torch.randint(256, (sets, 2, moved // 2), dtype=torch.uint8, device=p.device)
    rotations[report.COPY] = measure.Rotation(
        [partial(target.copy_, whence) for whence, target in source], p.device
    )
    errors[report.COPY] = None
    timings = measure.take_turns(rotations, samples)
    return [
        report.Row(
            op=op,
            shape=p.shape,
            heads=p.heads,
            head_dim=p.head_dim,
            ranks=p.ranks,
            batch=p.batch,
            name=name,
            launches=launch_counts.get((op, p.shape, name)),
            p10_us=timing.p10,
            median_us=timing.median,
            p90_us=timing.p90,
            moved_bytes=moved,
            copy_share=timings[report.COPY].median / timing.median,
            error=errors[name],
            rotated_mib=sets * moved / 2**20,
            device=device_name(p.device),
            software=software(),
        )
        for name, timing in timings.items()
    ]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where it is NaN, which max() would lose."""
    error = float((got.double() - want).norm() / want.norm())
    return math.inf if math.isnan(error) else error


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def software() -> str:
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    return f"torch {torch.__version__}, triton {triton_version}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.dcp kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16], metavar="N")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256, 4096], metavar="B")
    parser.add_argument("--samples", type=int, default=20, help="per candidate and turn, 2 turns")
    parser.add_argument("--csv", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write a PNG here; needs matplotlib")
    parser.add_argument("--plot-ranks", type=int, default=8, metavar="N", help="the plot's N")
    parser.add_argument(
        "--from-csv", nargs="+", type=Path, help="measure nothing, report on these figures together"
    )
    options = parser.parse_args(argv)
    if options.samples < 2:
        parser.error(f"--samples {options.samples}: at least 2 are needed for percentiles")
    for shape in options.shape:
        for N in options.ranks:
            if N < 1 or SHAPES[shape][0] % N:
                parser.error(f"--ranks {N} does not divide the {SHAPES[shape][0]} heads of {shape}")
    if options.device == "cuda" and not options.from_csv and not torch.cuda.is_available():
        parser.error("no CUDA device: use --device cpu, with a small --batch")

    if options.from_csv:
        rows = [row for path in options.from_csv for row in report.read_csv(path)]
    else:
        rows = run(options)
    print(report.table(rows))
    print(report.summary(rows))
    if options.csv:
        report.write_csv(rows, options.csv)
        print(f"figures: {options.csv}")
    if options.plot:
        print(report.plot(rows, options.plot, options.plot_ranks))
    return 0


def run(options: argparse.Namespace) -> list[report.Row]:
    torch.manual_seed(0)
    device = torch.device(options.device)
    print(f"{device_name(device)}, {software()}")
    peers = find_peers(device)
    rows: list[report.Row] = []
    launch_counts: dict[tuple[str, str, str], int | None] = {}
    for op in options.op:
        for shape in options.shape:
            for ranks in options.ranks:
                for batch in options.batch:
                    started = time.monotonic()
                    problem = Problem(shape, *SHAPES[shape], ranks, batch, device)
                    name = f"{op} {shape} N={ranks} B={batch}"
                    if not fits(op, problem):
                        print(f"not measured: {name} does not fit in the memory of the device")
                        continue
                    rows += measure_problem(op, problem, peers, options.samples, launch_counts)
                    spent = time.monotonic() - started
                    print(f"{name}: {spent:.1f} s", file=sys.stderr)
    return rows
