"""`benchmark.dcp collectives` in each of its ranks: the candidates, and what is timed."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmark.dcp import measure, report
from benchmark.dcp.collectives_report import Row, mark, table_line
from benchmark.dcp.kernels import BOUND, device_name, relative_error, software
from benchmark.dcp.kernels_stage import DTYPE, SHAPES, VARIANTS, Sizes, capped

if TYPE_CHECKING:
    from sglang_helix.srt.layers.dcp.exchange import Exchanger

SETS = 4  # of buffers; few, so that they stay in the cache
SYMM = f"{report.OURS} symm"

Run = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Problem(Sizes):
    @property
    def link_bytes(self) -> int:
        return (self.ranks - 1) * self.rows(self.owned)


class Candidate(NamedTuple):
    name: str
    group: Any
    """The GroupCoordinator it goes over: its capture context makes it capturable."""
    run: Run
    """(out [B, H, D], lse [B, H]) -> [B, H/N, D]; of another operation what `inputs` says"""
    takes: torch.dtype = DTYPE
    """What it asks attention for."""
    most: int | None = None
    """The largest batch; the series takes a collective above it."""
    lay: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    """What its inputs are made of (out, lse) before the time is taken; None: they are these."""
    head_dim: int | None = None
    """Elements of a head that it sends; None: all of them."""


class Bench:
    """One rank: its groups, and what to measure on them."""

    bound = BOUND
    """Of an output's relative error."""
    sets = SETS

    def __init__(
        self, rank: int, options: argparse.Namespace, ranks: int, folder: str, symmetric: bool
    ) -> None:
        from sglang.srt.distributed import parallel_state

        torch.set_num_threads(1)
        self.rank, self.ranks, self.options = rank, ranks, options
        self.symmetric = symmetric
        self.said: set[str] = set()
        self.kept: list[Any] = []
        nccl = options.device == "cuda"
        local_rank = rank % torch.cuda.device_count() if nccl else rank
        backend = "nccl" if nccl else "gloo"
        if nccl:
            torch.cuda.set_device(local_rank)
        else:
            from sglang_cpu_reference.plugin import collectives_on_cpu_tensors

            collectives_on_cpu_tensors()
        self.device = torch.device("cuda", local_rank) if nccl else torch.device("cpu")
        parallel_state.init_distributed_environment(
            world_size=ranks,
            rank=rank,
            distributed_init_method=f"file://{folder}/store",
            local_rank=local_rank,
            backend=backend,
            timeout=options.timeout,
        )
        build = partial(
            parallel_state.init_model_parallel_group,
            [list(range(ranks))],
            local_rank,
            backend,
            use_pynccl=nccl,
            use_custom_allreduce=False,
        )
        self.ours = with_our_all_to_all(build(group_name="dcp"))
        self.peers = build(group_name="dcp_sglang")
        if symmetric:
            # The first collective makes the communicator by which symmetric memory knows a group.
            torch.distributed.all_reduce(
                torch.zeros(1, device=self.device), group=self.peers.device_group
            )

    def say(self, what: str) -> None:
        if self.rank == 0:
            print(what, flush=True)

    def not_measured(self, candidate: str, reason: str) -> None:
        """Say so once, whatever the number of sizes."""
        line = f"not measured: {candidate} ({reason})"
        if line not in self.said:
            self.said.add(line)
            self.say(line)

    def of_all_ranks(self, value: Any) -> list[Any]:
        """Each rank's value, in rank order; over gloo, so a device that hangs is not asked."""
        values = [None] * self.ranks
        torch.distributed.all_gather_object(values, value, group=self.ours.cpu_group)
        return values

    def run(self) -> list[Row]:
        rows = []
        for shape in self.options.shape:
            heads, head_dim = SHAPES[shape]
            candidates = self.candidates(shape, heads, head_dim)
            for batch in self.options.batch:
                started = time.monotonic()
                problem = self.problem(shape, heads, head_dim, batch)
                found = self.measure(problem, candidates)
                for row in found:
                    self.say(table_line(row))
                rows += found
                if self.rank == 0:
                    spent = time.monotonic() - started
                    print(f"{shape} N={self.ranks} B={batch}: {spent:.1f} s", file=sys.stderr)
        return rows

    def problem(self, shape: str, heads: int, head_dim: int, batch: int) -> Problem:
        return Problem(shape, heads, head_dim, self.ranks, batch)

    def candidates(self, shape: str, heads: int, head_dim: int) -> list[Candidate]:
        if self.symmetric:
            return self.symmetric_candidates(heads // self.ranks, head_dim)
        from sglang_helix.srt.layers.dcp.exchange import BACKENDS, Exchanger
        from sglang_helix.srt.layers.dcp.partial import Partial

        def helix(exchange: Exchanger, x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
            return exchange(Partial(x, lse)).out

        exchangers = {name: Exchanger(name, self.ours) for name in BACKENDS}
        self.kept.append(exchangers)
        symm = self.prepared(SYMM, partial(self.prepare_symm, exchangers["symm"], heads, head_dim))
        ours = [
            Candidate(
                f"{report.OURS} {name}",
                self.ours,
                partial(helix, exchanger),
                most=symm if exchanger.backend.kernel else None,
            )
            for name, exchanger in exchangers.items()
        ]
        if self.options.variants:
            ours += [
                self.variant(f"{SYMM}, {name}", heads, head_dim, variant)
                for name, variant in VARIANTS.items()
            ]
        return [*ours, *sglang_candidates(shape, self.peers)]

    def variant(self, name: str, heads: int, head_dim: int, variant: dict[str, Any]) -> Candidate:
        """An experiment with the kernel, without a thread that watches it."""
        from sglang_helix.srt.layers.dcp.partial import Partial
        from sglang_helix.srt.layers.dcp.symm_launch import exchange
        from sglang_helix.srt.layers.dcp.symm_layout import Layout, largest_batch
        from sglang_helix.srt.layers.dcp.symm_workspace import between_ranks

        shape = self.ranks, heads, head_dim, DTYPE
        most = largest_batch(Layout(*shape, 0), max(self.options.batch))
        options = {"sms": None, **variant}
        sms = options.pop("sms")
        layout = Layout(*shape, most, **options)
        made: list[Any] = []

        def prepare() -> int:
            made.append(capped(between_ranks(self.ours.cpu_group, layout, self.device), sms))
            self.kept.append(made)
            return most

        def run(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
            return exchange(made[0], Partial(x, lse)).out

        return Candidate(name, self.ours, run, most=self.prepared(name, prepare))

    def symmetric_candidates(self, owned: int, head_dim: int) -> list[Candidate]:
        """What needs NCCL's symmetric memory; what cannot be built here says so on all ranks."""
        found = []
        for name, build in (
            ("flashinfer", flashinfer_candidates),
            ("torch all_to_all_nd", torch_candidates),
        ):
            failure, built = None, []
            try:
                built = build(self.peers, self.device, max(self.options.batch), owned, head_dim)
            except Exception as error:
                failure = failure_of(error)
            if reason := next(filter(None, self.of_all_ranks(failure)), None):
                self.not_measured(name, reason)
            else:
                found += built
        return found

    def prepared(self, name: str, prepare: Callable[[], int]) -> int:
        """Largest batch that goes through symmetric memory; 0, with the reason said, if none can.

        Its workspaces stay until the process ends: `kept` has them.
        """
        if self.device.type != "cuda":
            self.not_measured(name, "it needs GPUs with access to each other's memory")
            return 0
        try:
            return prepare()
        except RuntimeError as error:  # on every rank
            self.not_measured(name, str(error))
            return 0

    def prepare_symm(self, symm: Exchanger, heads: int, head_dim: int) -> int:
        symm.prepare(
            max_tokens=max(self.options.batch),
            num_heads=heads,
            head_dim=head_dim,
            dtype=DTYPE,
            timeout=self.options.timeout,
        )
        return symm.largest_prepared()

    def measure(self, p: Problem, candidates: list[Candidate]) -> list[Row]:
        (first, *others), want = self.inputs(p)
        rotations: dict[str, measure.Rotation] = {}
        errors: dict[str, float] = {}
        for candidate in candidates:
            if candidate.most is not None and p.batch > candidate.most:
                if candidate.most:
                    self.not_measured(candidate.name, f"not above batch {candidate.most}")
                continue
            sources = first.to(candidate.takes), *others
            if candidate.lay:
                sources = candidate.lay(*sources)
            inputs = [tuple(source.clone() for source in sources) for _ in range(self.sets)]
            rotation = self.rotation(candidate, [partial(candidate.run, *i) for i in inputs])
            if rotation is None:
                continue
            for own in inputs:  # a candidate may work in place
                for tensor, source in zip(own, sources, strict=True):
                    tensor.copy_(source)
            outputs = rotation.checked_outputs()
            error = max(self.of_all_ranks(max(relative_error(out, want) for out in outputs)))
            if not error <= self.bound:
                wrong = f"{candidate.name} at {p}: relative error {error}"
                if candidate.name.startswith(report.OURS):
                    raise AssertionError(wrong)
                self.say(f"not measured, for it is wrong: {wrong}")
                continue
            rotations[candidate.name], errors[candidate.name] = rotation, error
        timings = measure.take_turns(rotations, self.options.samples)
        sent = {c.name: replace(p, head_dim=c.head_dim or p.head_dim) for c in candidates}
        return [
            Row(
                **asdict(p),
                name=name,
                mode="graph" if rotations[name].graph else "eager",
                p10_us=timing.p10,
                median_us=timing.median,
                p90_us=timing.p90,
                link_bytes=sent[name].link_bytes,
                error=errors[name],
                mark=mark(self.options.device, self.ranks),
                device=device_name(self.device),
                software=software(),
            )
            for name, timing in self.slowest(timings).items()
        ]

    def inputs(self, p: Problem) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """This rank's out and lse, and its heads of all ranks' combination in float64."""
        drawn = []
        for rank in range(p.ranks):
            generator = torch.Generator(self.device).manual_seed(1000 * p.batch + rank)
            draw = partial(torch.randn, device=self.device, generator=generator)
            x = draw((p.batch, p.heads, p.head_dim), dtype=DTYPE)
            lse = 3 * draw((p.batch, p.heads))
            own = slice(self.rank * p.owned, (self.rank + 1) * p.owned)
            drawn.append((x[:, own].double(), lse[:, own].double()))
            if rank == self.rank:
                mine = x, lse
        weights = torch.stack([lse for _, lse in drawn]).softmax(0)[..., None]
        want = sum(weight * x for weight, (x, _) in zip(weights, drawn, strict=True))
        return mine, want

    def rotation(self, candidate: Candidate, calls: list[measure.Call]) -> measure.Rotation | None:
        """Captured where all ranks can, else as it is; None, with the reason said, where neither
        works. Ours must.
        """
        captures = [True, False] if self.device.type == "cuda" else [False]
        if self.options.eager:
            captures = [False]
        for capture in captures:
            failure = rotation = None
            try:
                if capture:
                    with candidate.group.graph_capture() as context:
                        rotation = measure.Rotation(calls, self.device, stream=context.stream)
                else:
                    rotation = measure.Rotation(calls, self.device, capture=False)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                failure = failure_of(error)
            reason = next(filter(None, self.of_all_ranks(failure)), None)
            if reason is None:
                return rotation
            if capture:
                self.say(f"not captured in a CUDA graph: {candidate.name} ({reason})")
        if candidate.name.startswith(report.OURS):
            raise RuntimeError(f"{candidate.name} does not run: {reason}")
        self.not_measured(candidate.name, reason)
        return None

    def slowest(self, timings: dict[str, measure.Timing]) -> dict[str, measure.Timing]:
        """Of each sample, the time of the rank that took longest."""
        of_ranks = self.of_all_ranks({name: timing.samples for name, timing in timings.items()})
        return {
            name: measure.Timing(
                [
                    max(sample)
                    for sample in zip(*(samples[name] for samples in of_ranks), strict=True)
                ]
            )
            for name in timings
        }


def with_our_all_to_all(group: Any) -> Any:
    """What the series' hooks do to the class, on one group: the peers keep SGLang's methods."""
    from sglang_helix.srt.distributed.all_to_all import group_all_to_all_single
    from sglang_helix.srt.distributed.device_communicators.pynccl import pynccl_all_to_all_single

    group.all_to_all_single = MethodType(group_all_to_all_single, group)
    if group.pynccl_comm is not None:
        group.pynccl_comm.all_to_all_single = MethodType(
            pynccl_all_to_all_single, group.pynccl_comm
        )
    return group


def sglang_candidates(shape: str, group: Any) -> list[Candidate]:
    from sglang.srt.layers.dcp import comm

    def a2a(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return comm.dcp_a2a_lse_reduce(x, lse, group)

    def ag_rs_mla(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return comm.cp_lse_ag_out_rs_mla(x, lse, group, is_lse_base_on_e=True).transpose(0, 1)

    def ag_rs_gqa(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return comm.cp_lse_ag_out_rs_mha(x, lse, group).to(DTYPE)

    ag_rs = (ag_rs_mla, DTYPE) if shape == "mla" else (ag_rs_gqa, torch.float32)
    return [Candidate("sglang a2a", group, a2a), Candidate("sglang ag_rs", group, *ag_rs)]


def by_owner(x: torch.Tensor, lse: torch.Tensor, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, H, D] and [B, H] -> [B, h, N, D] and [B, h, N]: FlashInfer's order, contiguous."""
    B, H, D = x.shape
    x, lse = x.view(B, ranks, H // ranks, D), lse.view(B, ranks, H // ranks)
    return x.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()


def failure_of(error: Exception) -> str:
    """Its first line, and of a build that failed the first that says why."""
    first, *more = f"{type(error).__name__}: {error}".splitlines()
    return "; ".join([first, *[line.strip() for line in more if "error:" in line][:1]])


def flashinfer_candidates(
    group: Any, device: torch.device, batch: int, owned: int, head_dim: int
) -> list[Candidate]:
    """FlashInfer's fused exchange. It is compiled here, which takes a minute the first time."""
    from flashinfer.comm import dcp_lse_reduce as fused

    rank, ranks = group.rank_in_group, group.world_size
    workspaces: dict[int, torch.Tensor] = {}

    def of_stream() -> torch.Tensor:
        """One for each stream, as it demands; all ranks come here in the same order."""
        stream = int(torch.cuda.current_stream(device).cuda_stream)
        if stream not in workspaces:
            workspaces[stream] = fused.decode_cp_a2a_lse_reduce_create_workspace(
                batch, owned, ranks, head_dim, DTYPE, group.device_group
            )
        return workspaces[stream]

    def kernel(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        reduced: torch.Tensor = fused.decode_cp_a2a_lse_reduce(
            x, lse, of_stream(), rank, ranks, "basee"
        )
        return reduced

    lay = partial(by_owner, ranks=ranks)
    return [
        Candidate("flashinfer kernel", group, kernel, lay=lay),
        Candidate("flashinfer", group, lambda x, lse: kernel(*lay(x, lse))),
    ]


def torch_candidates(
    group: Any, device: torch.device, batch: int, owned: int, head_dim: int
) -> list[Candidate]:
    """Our rows of output and LSE, read by torch's `all_to_all_nd` where the ranks packed them."""
    import torch.distributed._symmetric_memory as symm_mem
    from sglang_helix.srt.layers.dcp import lse_combine, packed_rows

    ranks, row = group.world_size, packed_rows.packed_row_bytes(head_dim, DTYPE)
    symm_mem.set_backend("NCCL")
    buffer = symm_mem.empty(ranks * batch * owned * row, dtype=torch.uint8, device=device)
    symm_mem.rendezvous(buffer, group.device_group)

    def run(x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        B = len(x)
        send = buffer[: ranks * B * owned * row].view(ranks, B, owned, row)
        lse_combine.pack(x, lse, ranks, send)
        received = x.new_empty(B * owned, ranks, row // DTYPE.itemsize)
        symm_mem.all_to_all_nd(
            send.view(DTYPE).view(ranks, B * owned, -1),
            received,
            0,
            1,
            group=group.device_group.group_name,
        )
        return lse_combine.combine(*from_owners(received, B, head_dim))

    return [Candidate("torch all_to_all_nd", group, run)]


def from_owners(rows: torch.Tensor, B: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows [B * h, N, row] -> views of partials [N, B, h, D] and their lse [N, B, h]."""
    by_rank = rows.unflatten(0, (B, -1)).permute(2, 0, 1, 3)
    tail = rows.view(torch.float32).unflatten(0, (B, -1)).permute(2, 0, 1, 3)
    return by_rank[..., :D], tail[..., -4]


def run_rank(
    rank: int, options: argparse.Namespace, ranks: int, folder: str, symmetric: bool
) -> None:
    """Body of a rank's process; the first leaves the figures in the folder."""
    from benchmark.dcp.collectives_gather import GatherBench
    from benchmark.dcp.collectives_values import ValuesBench

    bench = {"exchange": Bench, "gather": GatherBench, "values": ValuesBench}[options.op]
    rows = bench(rank, options, ranks, folder, symmetric).run()
    if rank == 0:
        report.write_csv(rows, figures_in(folder), Row)
    # No teardown: it is a collective, and the peers' threads may still be in one.
    sys.stdout.flush()
    os._exit(0)


def figures_in(folder: str) -> Path:
    return Path(folder, "figures.csv")
