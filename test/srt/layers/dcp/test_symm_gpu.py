"""The one-kernel exchange on a real device: ranks that run at the same time and out of step."""

from __future__ import annotations

import os
import time
import traceback
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
from sglang_helix.srt.layers.dcp.symm import PROTOCOLS, Layout, exchange
from sglang_helix.srt.layers.dcp.symm_workspace import Stall, SymmExchange
from srt.layers.dcp.symm_ranks import Ranks, expected, poison, relative_error
from torch.autograd import DeviceType

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or symm._INTERPRETED.value, reason="needs a CUDA device"
    ),
]

#: Exchanges per protocol of the test below; the proof for the record took a million in all.
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


@pytest.mark.parametrize("protocol", [*PROTOCOLS, None])
def test_ranks_out_of_step(protocol: str | None) -> None:
    """Each rank replays a graph of its own on a stream of its own, with delays of its own.

    So ranks are in different calls, up to one apart, as they are in a server. Batch sizes vary
    from call to call; with no protocol given, so does the protocol. Inputs are drawn anew between
    blocks of replays, and every row of every call is compared on the device.
    """
    N, H, D = 8, 16, 128
    layout = Layout(N, H, D, torch.bfloat16, lamport_tokens=6 if protocol else 3, staged_tokens=6)
    ranks = Ranks(layout, "cuda")
    batches = [1 + (5 * call) % 6 for call in range(CALLS)]
    xs = [torch.empty(N * B, H, D, dtype=torch.bfloat16, device="cuda") for B in batches]
    lses = [torch.empty(N * B, H, device="cuda") for B in batches]
    wants = [torch.empty(N, B, H // N, D, device="cuda") for B in batches]
    results = [torch.empty(N, B, H // N, D, dtype=torch.bfloat16, device="cuda") for B in batches]
    # Rows, so that all ranks' addresses are aligned alike and one compiled kernel serves all.
    wrong = torch.zeros(N, 32, dtype=torch.int32, device="cuda")
    noise = torch.randint(1, 2**30, (N, 32), dtype=torch.int32, device="cuda")

    def check(rank: int, call: int) -> None:
        result, want = results[call][rank], wants[call][rank]
        _check[(want.numel() // D,)](result, want, wrong[rank], D=D, BOUND=BOUND, num_warps=1)

    def do(rank: int, call: int) -> None:
        _delay[(1,)](noise[rank], MOST=20_000, num_warps=1)
        partial = xs[call].chunk(N)[rank], lses[call].chunk(N)[rank]
        exchange(ranks.apart[rank], partial, into=results[call][rank], protocol=protocol)
        check(rank, call)

    def draw() -> None:
        for x, lse, want in zip(xs, lses, wants, strict=True):
            x.normal_()
            lse.normal_().mul_(3)
            poison(x, lse)
            combined, _ = expected(x, lse, N)
            want.copy_(combined.unflatten(1, (N, -1)).movedim(1, 0))

    streams = [torch.cuda.Stream() for _ in range(N)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(N)]
    # Loading a kernel may wait for those that run, so none may be waiting for a rank then.
    draw()
    check(0, 0)
    torch.cuda.synchronize()
    wrong.zero_()
    for call in range(CALLS):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                do(rank, call)
    torch.cuda.synchronize()
    for rank, (stream, graph) in enumerate(zip(streams, graphs, strict=True)):
        with torch.cuda.graph(graph, stream=stream):
            for call in range(CALLS):
                do(rank, call)
    done = 1
    while done * CALLS < REPLAYS:
        draw()
        torch.cuda.synchronize()
        for _ in range(min(500, -(-REPLAYS // CALLS) - done)):
            for stream, graph in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            done += 1
        torch.cuda.synchronize()
    assert wrong.sum() == 0
    for rank in range(N):  # every row went through each call that had it
        epochs = ranks.together.epochs[rank].view(-1, layout.rows_per_token)[:, 0].tolist()
        assert epochs == [1 + done * sum(b < B for B in batches) for b in range(6)]
    print(f"{protocol or 'by size'}: {done * CALLS} calls by each of {N} ranks, none wrong")


def test_one_launch_and_one_compilation_for_all_batch_sizes() -> None:
    layout = Layout(4, 8, 128, torch.bfloat16, lamport_tokens=40, staged_tokens=0)
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


def _ranks_sharing_a_gpu(function: Any, world_size: int, timeout: float) -> list[Any]:
    """Call function(rank, group) in processes that share GPU 0; a process's error is raised."""
    context = torch.multiprocessing.get_context("spawn")
    port = 20_000 + os.getpid() % 20_000
    processes, pipes = [], []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(function, rank, world_size, port, theirs), daemon=True
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


def _rank(function: Any, rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    try:
        torch.cuda.set_device(0)
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
        )
        pipe.send((True, function(rank, torch.distributed.group.WORLD)))
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
    symm._LAMPORT_MAX_BYTES = 64 << 10  # so that the largest batch takes flags
    exchanger = SymmExchange(group, 40, H, D, torch.bfloat16, torch.device("cuda:0"), timeout=60)
    own = exchanger.layout.owned_by(rank)
    worst = 0.0
    for B in (1, 7, 40):
        x, lse = _inputs(N, B, H, D, seed=B)
        mine, my_lse = x.chunk(N)[rank], lse.chunk(N)[rank]
        exchanger.reduce(mine, my_lse)
        torch.cuda.synchronize()
        group.barrier().wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [exchanger.reduce(mine, my_lse, layer=layer).out for layer in range(3)]
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
def test_processes_share_a_gpu(world_size: int) -> None:
    errors = _ranks_sharing_a_gpu(_replays_in_processes, world_size, timeout=120)
    assert max(errors) < BOUND


#: Kept until the process ends: freeing symmetric memory waits for the device, so it would never
#: return beside a stuck kernel.
_stuck: list[SymmExchange] = []


def _one_rank_never_calls(rank: int, group: torch.distributed.ProcessGroup) -> Stall | None:
    stalls: list[Stall] = []
    exchanger = SymmExchange(
        group, 4, 4, 128, torch.bfloat16, torch.device("cuda:0"), timeout=4, on_stall=stalls.append
    )
    _stuck.append(exchanger)
    x, lse = _inputs(1, 2, 4, 128, seed=rank)
    for _ in range(3):
        exchanger.reduce(x, lse, layer=17)
    torch.cuda.synchronize()
    if rank == 0:
        exchanger.reduce(x, lse, layer=23)  # the other rank does not
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
    stall, other = _ranks_sharing_a_gpu(_one_rank_never_calls, 2, timeout=100)
    assert other is None
    assert stall == Stall(rank=0, peer=1, layer=23, epoch=4)
