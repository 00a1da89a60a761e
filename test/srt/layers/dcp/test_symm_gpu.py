"""The one-kernel exchange and gather on a device: ranks at the same time and out of step."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

# Ranks play on streams of their own: two that shared a hardware queue would wait for ever. Read
# when CUDA starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import triton
import triton.language as tl
from sglang_helix.srt.layers.dcp import symm
from sglang_helix.srt.layers.dcp.partial import Partial
from sglang_helix.srt.layers.dcp.symm_launch import Workspace, exchange, gather
from sglang_helix.srt.layers.dcp.symm_layout import Layout, QueryLayout
from sglang_helix.srt.layers.dcp.symm_workspace import Stall, SymmExchange, between_ranks
from srt.layers.dcp.symm_ranks import Ranks, expected, poison, relative_error
from torch.autograd import DeviceType

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or symm._INTERPRETED.value, reason="needs a CUDA device"
    ),
]

#: Exchanges of the test below; the proof for the record took a million.
REPLAYS = int(os.environ.get("HELIX_SYMM_REPLAYS", "4000"))
CALLS = 16  # in one graph
BOUND = 4e-3  # bf16, per row of D elements, against the largest magnitude of the row


@triton.jit
def _delay(state_ptr, MOST: tl.constexpr):
    """Spin for a random time below MOST ns in one launch of four; the state is a generator's."""
    state = tl.load(state_ptr) * 1664525 + 1013904223
    tl.store(state_ptr, state)
    draw = (state >> 8) & 0xFFFF
    if draw % 4 == 0:
        start = tl.extra.cuda.globaltimer()
        wait = draw * MOST // 65536
        while (tl.extra.cuda.globaltimer() - start) < wait:
            pass


@triton.jit
def _check(got_ptr, want_ptr, wrong_ptr, D: tl.constexpr, BOUND: tl.constexpr):
    """Count rows that differ from what is expected, and wipe them, so that none is seen twice."""
    at = tl.program_id(0) * D + tl.arange(0, D)
    got, want = tl.load(got_ptr + at).to(tl.float32), tl.load(want_ptr + at)
    bad = tl.max((tl.abs(got - want) > BOUND * tl.max(tl.abs(want), 0)).to(tl.int32), 0)
    bad = tl.maximum(bad, tl.max((got != got).to(tl.int32), 0))
    tl.atomic_add(wrong_ptr, bad)
    tl.store(got_ptr + at, tl.full([D], float("nan"), tl.float32).to(got_ptr.dtype.element_ty))


class Batches:
    """Partial results of all ranks for each call of a graph, and what is to come of them."""

    bound = BOUND

    def __init__(self, layout: Layout, warps: int | None = None):
        self.layout, self.warps = layout, warps
        self.ranks = ranks = layout.ranks
        heads, width = layout.heads, layout.head_dim
        self.sizes = [1 + (5 * call) % 6 for call in range(CALLS)]
        rows = [(ranks * B, heads) for B in self.sizes]
        self.xs = [torch.empty(*r, width, dtype=torch.bfloat16, device="cuda") for r in rows]
        self.lses = [torch.empty(r, device="cuda") for r in rows]
        self.wants = [
            torch.empty(ranks, B, heads // ranks, width, device="cuda") for B in self.sizes
        ]

    def draw(self) -> None:
        """The same on every rank that has seeded torch alike."""
        for x, lse, want in zip(self.xs, self.lses, self.wants, strict=True):
            x.normal_()
            lse.normal_().mul_(3)
            poison(x, lse)
            combined, _ = expected(x, lse, self.ranks)
            want.copy_(combined.unflatten(1, (self.ranks, -1)).movedim(1, 0))

    def run(self, workspace: Workspace[Layout], call: int) -> torch.Tensor:
        """A rank's call."""
        rank = workspace.rank
        partial = Partial(*(part[call].chunk(self.ranks)[rank] for part in (self.xs, self.lses)))
        return exchange(workspace, partial).out


class Queries:
    """The same of queries, whose every bit is to arrive."""

    bound = 0.0
    warps = None  # as many as fit

    def __init__(self, layout: QueryLayout):
        self.layout = layout
        self.ranks = ranks = layout.ranks
        self.sizes = [1 + (5 * call) % 6 for call in range(CALLS)]
        options: Any = {"dtype": layout.wire, "device": "cuda"}
        self.parts = [
            [torch.empty(ranks * T, layout.owned, width, **options) for width in layout.widths]
            for T in self.sizes
        ]
        shape = layout.heads, sum(layout.widths)
        self.wants = [torch.empty(ranks, T, *shape, device="cuda") for T in self.sizes]

    def draw(self) -> None:
        """The same on every rank that has seeded torch alike."""
        for parts, want in zip(self.parts, self.wants, strict=True):
            for part in parts:
                part.normal_()
            everyones = torch.cat(parts, -1).unflatten(0, (self.ranks, -1))
            want.copy_(everyones.transpose(0, 1).flatten(1, 2).expand_as(want))

    def run(self, workspace: Workspace[QueryLayout], call: int) -> torch.Tensor:
        """A rank's call."""
        return gather(workspace, [p.chunk(self.ranks)[workspace.rank] for p in self.parts[call]])


class OutOfStep:
    """One rank: a graph of calls with delays of its own, every row compared on the device."""

    def __init__(self, workspace: Workspace[Any], batches: Batches | Queries):
        self.workspace = replace(workspace, warps=batches.warps or workspace.warps)
        self.batches = batches
        self.wants = [want[workspace.rank] for want in batches.wants]
        self.results = [torch.empty_like(want, dtype=torch.bfloat16) for want in self.wants]
        self.wrong = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.noise = torch.full((1,), 1 + 7919 * workspace.rank, dtype=torch.int32, device="cuda")
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def check(self, call: int) -> None:
        result, want = self.results[call], self.wants[call]
        rows, D = want.numel() // want.shape[-1], want.shape[-1]
        options = {"D": D, "BOUND": self.batches.bound, "num_warps": 1}
        _check[(rows,)](result, want, self.wrong, **options)

    def do(self, call: int) -> None:
        """Tensors begin on 16 bytes, so one compiled kernel serves all calls and ranks."""
        _delay[(1,)](self.noise, MOST=20_000, num_warps=1)
        self.results[call] = self.batches.run(self.workspace, call)
        self.check(call)

    def capture(self) -> None:
        with torch.cuda.graph(self.graph, stream=self.stream):
            for call in range(CALLS):
                self.do(call)

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()


def replays_out_of_step(ranks: list[OutOfStep], batches: Batches | Queries) -> int:
    """Run the ranks of this process out of step, with inputs drawn anew; calls of each."""
    # Loading a kernel may wait for those that run, so none may be waiting for a rank then.
    batches.draw()
    for rank in ranks:
        rank.check(0)
    torch.cuda.synchronize()
    for rank in ranks:
        rank.wrong.zero_()
    torch.cuda.synchronize()
    for call in range(CALLS):
        for rank in ranks:
            with torch.cuda.stream(rank.stream):
                rank.do(call)
    torch.cuda.synchronize()
    for rank in ranks:
        rank.capture()
    done = 1
    while done * CALLS < REPLAYS:
        batches.draw()
        torch.cuda.synchronize()
        for _ in range(min(500, -(-REPLAYS // CALLS) - done)):
            for rank in ranks:
                rank.replay()
            done += 1
        torch.cuda.synchronize()
    for rank in ranks:
        assert rank.wrong.item() == 0
        # Every row went through each call that had it.
        layout = rank.workspace.layout
        epochs = rank.workspace.epochs.view(-1, layout.rows_per_token)[:, 0].tolist()
        assert epochs == [1 + done * sum(b < B for B in batches.sizes) for b in range(6)]
    return done * CALLS


#: What plays out of step on so many ranks, for batches of up to 6.
OUT_OF_STEP: dict[str, Callable[[int], Batches | Queries]] = {
    "exchange": lambda ranks: Batches(Layout(ranks, 16, 128, torch.bfloat16, 6)),
    "one row ahead, of few programs": lambda ranks: Batches(
        Layout(ranks, 16, 128, torch.bfloat16, 6, ahead=True), warps=4
    ),
    "gather": lambda ranks: Queries(QueryLayout(ranks, 16, (448, 64), torch.bfloat16, 6)),
}


@pytest.mark.parametrize("what", OUT_OF_STEP)
def test_ranks_out_of_step(what: str) -> None:
    """Each rank replays a graph of its own on a stream of its own, with delays of its own.

    So ranks are in different calls, up to one apart, as they are in a server. Batch sizes vary
    from call to call.
    """
    N = 8
    batches = OUT_OF_STEP[what](N)
    ranks = Ranks(batches.layout, "cuda")
    calls = replays_out_of_step([OutOfStep(w, batches) for w in ranks.apart], batches)
    print(f"{calls} calls by each of {N} ranks, none wrong")


def _gpu_out_of_step(rank: int, group: torch.distributed.ProcessGroup, what: str) -> int:
    torch.manual_seed(0)
    batches, device = OUT_OF_STEP[what](group.size()), torch.cuda.current_device()
    workspace = between_ranks(group, batches.layout, torch.device("cuda", device))
    calls = replays_out_of_step([OutOfStep(workspace, batches)], batches)
    group.barrier().wait()  # peers may still write to this rank's memory
    return calls


@pytest.mark.parametrize("what", OUT_OF_STEP)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_gpus_out_of_step(world_size: int, what: str) -> None:
    """The same over the link: a process and a GPU for each rank."""
    if world_size > torch.cuda.device_count():
        pytest.skip(f"needs {world_size} GPUs: ranks that share one take turns of milliseconds")
    calls = _in_processes(_gpu_out_of_step, world_size, 400, what)
    print(f"{calls} calls by {world_size} GPUs, none wrong")


def test_one_launch_and_one_compilation_for_all_batch_sizes() -> None:
    layout = Layout(4, 8, 128, torch.bfloat16, max_tokens=40)
    ranks = Ranks(layout, "cuda")

    def call(B: int) -> None:
        x = torch.randn(4 * B, 8, 128, device="cuda").bfloat16()
        ranks(x, torch.randn(4 * B, 8, device="cuda"), layer=B)

    def compiled() -> int:
        return len(symm.exchange_kernel.device_caches[torch.cuda.current_device()][0])

    call(2)
    before = compiled()
    for B in (1, 3, 16, 17, 32, 40):
        call(B)
    assert compiled() == before
    x, lse = torch.randn(8, 8, 128, device="cuda").bfloat16(), torch.randn(8, 8, device="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ranks(x, lse)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
    assert on_device == ["exchange_kernel"]


def _in_processes(function: Any, world_size: int, timeout: float, *args: Any) -> list[Any]:
    """Call function(rank, group, *args) in processes; an error of any is raised.

    Rank r uses GPU r modulo their number: ranks share GPUs where there are fewer.
    """
    context = torch.multiprocessing.get_context("spawn")
    port = 20_000 + os.getpid() % 20_000
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(rank, world_size, port, theirs, function, args), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < world_size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            assert ready, f"only ranks {sorted(results)} finished"
            for pipe in ready:
                # A rank that failed leaves the others waiting for it.
                succeeded, result = pipe.recv()
                assert succeeded, result
                results[pipes.index(pipe)] = result
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(
    rank: int, world_size: int, port: int, pipe: Connection, function: Any, args: tuple[Any, ...]
) -> None:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    try:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
        )
        pipe.send((True, function(rank, torch.distributed.group.WORLD, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        time.sleep(1)  # peers may still read this rank's memory
        os._exit(0)


def _inputs(ranks: int, B: int, H: int, D: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stacked partials of all ranks; every process draws the same."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(ranks * B, H, D, device="cuda", generator=generator).bfloat16()
    return x, torch.randn(ranks * B, H, device="cuda", generator=generator)


def _replays_in_processes(rank: int, group: torch.distributed.ProcessGroup) -> float:
    N, H, D = group.size(), 10, 128  # uneven for four ranks
    device = torch.device("cuda", torch.cuda.current_device())
    exchanger = SymmExchange(group, 40, H, D, torch.bfloat16, device, timeout=60)
    own = exchanger.layout.owned_by(rank)
    worst = 0.0
    for B in (1, 7, 40):
        x, lse = _inputs(N, B, H, D, seed=B)
        mine, my_lse = x.chunk(N)[rank], lse.chunk(N)[rank]
        exchanger(Partial(mine, my_lse))
        torch.cuda.synchronize()
        group.barrier().wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [exchanger(Partial(mine, my_lse), layer=layer).out for layer in range(3)]
        for seed in range(5):
            fresh, fresh_lse = _inputs(N, B, H, D, seed=100 * B + seed)
            mine.copy_(fresh.chunk(N)[rank])
            my_lse.copy_(fresh_lse.chunk(N)[rank])
            graph.replay()
            want, _ = expected(fresh, fresh_lse, N)
            for result in results:
                worst = max(worst, relative_error(result, want[:, own.start : own.stop]))
    exchanger.close()
    group.barrier().wait()
    return worst


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes(world_size: int) -> None:
    errors = _in_processes(_replays_in_processes, world_size, 120)
    assert max(errors) < BOUND


#: Kept until the process ends: freeing symmetric memory waits for the device, so it would never
#: return beside a stuck kernel.
_stuck: list[SymmExchange] = []


def _one_rank_never_calls(rank: int, group: torch.distributed.ProcessGroup) -> Stall | None:
    stalls: list[Stall] = []
    device = torch.device("cuda", torch.cuda.current_device())
    exchanger = SymmExchange(
        group, 4, 4, 128, torch.bfloat16, device, timeout=4, on_stall=stalls.append
    )
    _stuck.append(exchanger)
    x, lse = _inputs(1, 2, 4, 128, seed=rank)
    for _ in range(3):
        exchanger(Partial(x, lse), layer=17)
    torch.cuda.synchronize()
    if rank == 0:
        exchanger(Partial(x, lse), layer=23)  # the other rank does not
        deadline = time.monotonic() + 40
        while not stalls and time.monotonic() < deadline:
            time.sleep(0.2)
    # Over TCP: nothing here may wait for a device whose kernel will never end.
    store = torch.distributed.distributed_c10d._get_default_store()
    if rank == 0:
        store.set("seen", "")
    store.wait(["seen"], timedelta(seconds=60))
    return stalls[0] if stalls else None


def test_a_stuck_exchange_is_reported() -> None:
    stall, other = _in_processes(_one_rank_never_calls, 2, 100)
    assert other is None
    assert stall == Stall(rank=0, peer=1, layer=23, epoch=4)
