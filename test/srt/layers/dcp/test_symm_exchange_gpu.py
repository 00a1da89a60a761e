"""`--dcp-comm-backend symm` through SGLang's own group objects, on ranks that may share a GPU.

With one GPU: HELIX_TEST_SHARE_GPUS=1, NCCL 2.30 or newer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang.srt.distributed import parallel_state
from sglang_helix.srt.layers.dcp import comm, gather, symm
from sglang_helix.srt.layers.dcp.exchange import Exchanger
from sglang_helix.srt.layers.dcp.lse_combine import combine_splits
from sglang_helix.srt.layers.dcp.partial import Masked, Partial, Splits
from srt.distributed.ranks import RankError, World, collective_backend, run_ranks
from srt.layers.dcp.symm_ranks import expected, poison, relative_error
from srt.layers.dcp.test_exchange import install
from torch.autograd import DeviceType

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or symm._INTERPRETED.value, reason="needs a CUDA device"
    ),
]

BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
MAX_TOKENS = 24
BLOCK = 32  # tokens of a block of the splits made here


@pytest.fixture(scope="module", params=[2, 4])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    backend = collective_backend(request.param)
    with World(request.param, backend=backend, timeout=180) as world:
        yield world


def prepared(width: int, heads: int, dtype: torch.dtype, timeout: float = 60.0) -> Any:
    """This rank's group, ready for `symm`."""
    install()
    group = parallel_state.get_world_group()
    # One for all tests of the process: what peers may still write to is not freed.
    if not hasattr(group, "exchanger"):
        group.exchanger = Exchanger("symm", group)
    group.exchanger.prepare(
        max_tokens=MAX_TOKENS,
        num_heads=heads,
        head_dim=width,
        dtype=dtype,
        timeout=timeout,
    )
    return group


class Step:
    """Partial results of all ranks for one batch; the same on every rank."""

    def __init__(self, group: Any, B: int, heads: int, width: int, dtype: torch.dtype, seed: int):
        torch.manual_seed(seed)
        self.group, ranks = group, group.world_size
        x, lse = torch.randn(ranks * B, heads, width).to(dtype), torch.randn(ranks * B, heads) * 3
        poison(x, lse)
        empty = torch.rand(ranks * B) < 0.2
        lse.masked_fill_(empty[:, None], -torch.inf)
        self.want, self.want_lse = (
            whole.chunk(ranks, dim=1)[group.rank_in_group] for whole in expected(x, lse, ranks)
        )
        self.out, self.lse, self.empty = (
            whole[B * group.rank_in_group :][:B].to(group.device) for whole in (x, lse, empty)
        )

    def error(self, out: torch.Tensor) -> float:
        return relative_error(out.cpu(), self.want)


def exact_on_rank(rank: int, world_size: int) -> list[str]:
    wrong = []
    for width, heads, dtype, bases in (
        (128, 2 * world_size, torch.bfloat16, (False,)),
        (512, 4 * world_size, torch.bfloat16, (False, True)),
        (80, world_size, torch.float16, (False,)),
        (128, world_size, torch.float32, (False,)),
    ):
        group = prepared(width, heads, dtype)
        # The last two are a2a's.
        for B in (1, 8, 9, MAX_TOKENS, 0, 2, MAX_TOKENS + 1, 3 * MAX_TOKENS):
            step = Step(group, B, heads, width, dtype, seed=B)
            for base2 in bases:
                scale = torch.tensor(2.0).log().item() if base2 else 1.0
                partial = Partial(step.out, step.lse / scale)
                unmarked = partial.lse.masked_fill(step.empty[:, None], 9.0)
                for left in (partial, Masked(step.out, unmarked, step.empty)):
                    out, lse = group.exchanger(left, base2=base2)
                    error, form = step.error(out), type(left).__name__
                    lse_ok = torch.allclose(lse.cpu().double() * scale, step.want_lse, atol=1e-5)
                    if not (error < BOUND[dtype] and lse_ok and out.dtype == dtype):
                        what = f"{form} {width} x {heads} {dtype} B={B} base2={base2}"
                        wrong.append(f"{what}: {error:.1e}")
    return wrong


def test_exact(world: World) -> None:
    assert not list(itertools.chain(*world.run(exact_on_rank)))


def heads_first_on_rank(rank: int, world_size: int) -> list[str]:
    width, heads, dtype = 512, 4 * world_size, torch.bfloat16
    group = prepared(width, heads, dtype)
    wrong = []
    for B in (1, 5, MAX_TOKENS, MAX_TOKENS + 1):
        step = Step(group, B, heads, width, dtype, seed=B)
        out = comm.cp_lse_ag_out_rs_mla(step.out, step.lse, group, is_lse_base_on_e=True)
        in_one_piece = out.is_contiguous() or B > MAX_TOKENS
        if not (step.error(out.transpose(0, 1)) < BOUND[dtype] and in_one_piece):
            wrong.append(f"B={B}")
        # What the model does with it.
        out.transpose(0, 1).view(-1, heads // world_size, width)
    return wrong


def test_latents_come_heads_first(world: World) -> None:
    assert not list(itertools.chain(*world.run(heads_first_on_rank)))


def rounded_up(value: torch.Tensor, unit: torch.Tensor | int) -> torch.Tensor:
    return (value + unit - 1) // unit * unit


def random_splits(
    group: Any, B: int, heads: int, width: int, seed: int
) -> tuple[Splits, torch.Tensor]:
    """Splits of random local lengths, NaN where none is written, and what is to come of them."""
    torch.manual_seed(1000 * seed + group.rank_in_group)
    most = 8
    counts = torch.randint(1, most + 1, (B,), dtype=torch.int32)
    lens = torch.randint(0, 300, (B,), dtype=torch.int32)
    indptr = torch.zeros(B + 1, dtype=torch.int32)
    indptr[1:] = lens.cumsum(0)
    share = rounded_up(rounded_up(lens, counts) // counts, BLOCK)
    written = torch.arange(most) * share[:, None] < lens[:, None]
    out = torch.randn(B, heads, most, width)
    lse = torch.where(written[:, None], torch.randn(B, heads, most), -torch.inf)
    out.masked_fill_(~written[:, None, :, None], float("nan"))
    device = group.device
    splits = Splits(*(t.to(device) for t in (out, lse, indptr, counts)), BLOCK)
    x, total = combine_splits(splits, torch.float32)
    x, total = (group.all_gather(part, dim=0).cpu() for part in (x, total))
    want, _ = expected(x, total, group.world_size)
    return splits, want.chunk(group.world_size, dim=1)[group.rank_in_group]


def splits_on_rank(rank: int, world_size: int) -> list[str]:
    width, heads, dtype = 128, 2 * world_size, torch.bfloat16
    group = prepared(width, heads, dtype)
    wrong = []
    for B in (1, 7, MAX_TOKENS, MAX_TOKENS + 1):
        splits, want = random_splits(group, B, heads, width, seed=B)
        out, _ = group.exchanger(splits, dtype)
        error = relative_error(out.cpu(), want)
        if not error < BOUND[dtype]:
            wrong.append(f"B={B}: {error:.1e}")
    splits, _ = random_splits(group, 5, heads, width, seed=5)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        group.exchanger(splits, dtype)
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
    if on_device != ["exchange_kernel"]:
        wrong.append(f"launches {on_device}")
    return wrong


def test_splits_in_one_launch(world: World) -> None:
    assert not list(itertools.chain(*world.run(splits_on_rank)))


def graphs_on_rank(rank: int, world_size: int) -> list[str]:
    """Graphs of several batch sizes, several layers each, replayed in any order."""
    width, heads, dtype, layers = 128, 2 * world_size, torch.bfloat16, 3
    group = prepared(width, heads, dtype)
    steps, outputs, graphs = {}, {}, {}
    for B in (1, 4, 11, MAX_TOKENS):
        steps[B] = step = Step(group, B, heads, width, dtype, seed=B)

        def forward(step: Step = step) -> list[torch.Tensor]:
            return [group.exchanger(Partial(step.out, step.lse)).out for _ in range(layers)]

        for _ in range(2):  # as SGLang's capture does
            torch.cuda.synchronize()
            group.barrier()
            forward()
        graphs[B] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[B]):
            outputs[B] = forward()
    wrong = []
    for turn in range(60):
        B = list(graphs)[(turn * turn + turn // 7) % len(graphs)]
        step = steps[B]
        fresh = Step(group, B, heads, width, dtype, seed=100 + turn)
        step.out.copy_(fresh.out)
        step.lse.copy_(fresh.lse)
        if rank == turn % world_size:
            time.sleep(0.01)  # out of step
        graphs[B].replay()
        eager, _ = group.exchanger(Partial(fresh.out, fresh.lse))
        for result in (*outputs[B], eager):
            if not (error := fresh.error(result)) < BOUND[dtype]:
                wrong.append(f"turn {turn} B={B}: {error:.1e}")
    return wrong


def test_graphs_of_several_batch_sizes(world: World) -> None:
    assert not list(itertools.chain(*world.run(graphs_on_rank)))


def gathered_on_rank(rank: int, world_size: int) -> list[str]:
    """Queries by the kernel beside the group's all-gather, eager and from graphs, every bit."""
    wrong = []
    for widths, heads in (((512, 64), 4 * world_size), ((128,), 2 * world_size)):
        group = prepared(128, 2 * world_size, torch.bfloat16)
        group.exchanger.prepare_queries(
            max_tokens=MAX_TOKENS,
            num_heads=heads,
            widths=widths,
            dtype=torch.bfloat16,
            timeout=60.0,
        )
        for T in (1, 8, MAX_TOKENS, 0, 3, MAX_TOKENS + 1):
            rows = torch.empty(T, heads // world_size, 640, device=group.device).bfloat16()
            parts = rows[..., : sum(widths)].split(widths, dim=-1)

            def call(parts: Any = parts, group: Any = group) -> list[torch.Tensor]:
                return [gather.all_gather(parts, group) for _ in range(3)]

            def differ(results: list[torch.Tensor], parts: Any = parts, group: Any = group) -> int:
                whole = torch.cat(parts, -1).transpose(0, 1).contiguous()
                want = group.all_gather(whole, dim=0).transpose(0, 1)
                return sum(not torch.equal(result, want) for result in results)

            rows.normal_()
            problems = differ(call())
            torch.cuda.synchronize()
            if 0 < T <= MAX_TOKENS:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    results = call()
                for turn in range(20):
                    rows.normal_()
                    if rank == turn % world_size:
                        time.sleep(0.01)  # out of step
                    graph.replay()
                    problems += differ(results)
            if problems:
                wrong.append(f"{widths} T={T}: {problems}")
        rows = torch.randn(4, heads // world_size, sum(widths), device=group.device).bfloat16()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            gather.all_gather(rows.split(widths, dim=-1), group)
            torch.cuda.synchronize()
        on_device = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
        if on_device != ["gather_kernel"]:
            wrong.append(f"launches {on_device}")
    return wrong


def test_queries_in_one_launch(world: World) -> None:
    assert not list(itertools.chain(*world.run(gathered_on_rank)))


def stuck_on_rank(rank: int, world_size: int) -> None:
    group = prepared(128, 2 * world_size, torch.bfloat16, timeout=4.0)
    step = Step(group, 2, 2 * world_size, 128, torch.bfloat16, seed=0)
    for _ in range(3):
        group.exchanger(Partial(step.out, step.lse))
    torch.cuda.synchronize()
    if rank == 0:
        group.exchanger.layer = 23
        group.exchanger(Partial(step.out, step.lse))  # the other rank does not
    time.sleep(30)


def test_a_stuck_peer_ends_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError, match="rank 0 of 2: died"):
        run_ranks(stuck_on_rank, 2, backend=collective_backend(2), timeout=100)
    assert (
        "symm exchange is stuck: rank 0 of the KVP group waits in layer 23, epoch 4, for rank 1"
        in capfd.readouterr().err
    )


def refused_on_rank(rank: int, world_size: int) -> str:
    with pytest.raises(RuntimeError) as refused:
        prepared(128, 2 * world_size, torch.bfloat16)
    return str(refused.value)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="ranks have GPUs of their own")
def test_ranks_that_cannot_share_memory_are_refused_everywhere() -> None:
    said = run_ranks(
        refused_on_rank,
        2,
        backend=collective_backend(2),
        timeout=100,
        env={"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "0"},
    )
    assert len(said) == 2
    for message in said:
        assert "ranks of the KVP group share GPU" in message
        assert "use --dcp-comm-backend a2a instead of symm" in message
