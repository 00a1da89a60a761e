"""All-to-all against lists of tensors.

One suite for both worlds: the tests marked ``multi_gpu`` run over gloo on a machine without GPUs,
and over NCCL, eager and captured in a CUDA graph, on one with GPUs. There
``pytest -m multi_gpu`` takes the GPUs it finds and skips world sizes that need more, unless
HELIX_TEST_SHARE_GPUS=1 lets ranks share them.

NCCL's own path without a GPU: test_pynccl.py.
"""

import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang_helix.srt.distributed.all_to_all import check_all_to_all, group_all_to_all_single
from sglang_helix.srt.distributed.device_communicators import pynccl
from sglang_helix.srt.distributed.device_communicators.pynccl import pynccl_all_to_all_single
from srt.distributed.all_to_all_cases import WORLD_SIZES, Buffers, cases
from srt.distributed.fake_nccl import fake_communicator
from srt.distributed.ranks import World, collective_backend, run_ranks


def test_bytes_of_every_chunk() -> None:
    x = torch.zeros(6, 3, dtype=torch.float32)
    assert check_all_to_all(torch.zeros(6, 3), x, 0, 3) == ([24] * 3, [24] * 3)
    assert check_all_to_all(torch.zeros(4, 3), x, 1, 2, [3, 1], [5, 1]) == ([36, 12], [60, 12])
    assert check_all_to_all(torch.zeros(0, 3), torch.zeros(0, 3), 0, 2) == ([0, 0], [0, 0])
    assert check_all_to_all(torch.zeros(4, 0), torch.zeros(4, 0), 0, 2) == ([0, 0], [0, 0])
    assert check_all_to_all(torch.zeros(6, 3), x, 1, 2, None, (3, 3)) == ([36, 36], [36, 36])


def test_neighbouring_slices_do_not_overlap() -> None:
    memory = torch.zeros(8, 3)
    check_all_to_all(memory[4:], memory[:4], 0, 2)
    check_all_to_all(memory[:4], memory[4:], 0, 2)
    check_all_to_all(memory[3:3], memory[2:2], 0, 2)


_MEMORY = torch.zeros(8, 3)


@pytest.mark.parametrize(
    ("output", "input", "splits", "named"),
    [
        (torch.zeros(4), torch.zeros(4).half(), (), ["torch.float16", "torch.float32"]),
        (torch.zeros(4), torch.zeros(4, device="meta"), (), ["meta", "cpu"]),
        (torch.zeros(()), torch.zeros(()), (), ["input []", "output []"]),
        (torch.zeros(4, 2), torch.zeros(4, 3), (), ["[4, 2]", "[4, 3]"]),
        (torch.zeros(4, 2), torch.zeros(8), (), ["[4, 2]", "[8]"]),
        (torch.zeros(4, 2), torch.zeros(2, 4).t(), (), ["input", "[4, 2]", "[1, 4]", "contiguous"]),
        (torch.zeros(4, 4)[:, :2], torch.zeros(4, 2), (), ["output", "[4, 1]", "contiguous"]),
        (torch.zeros(4).cfloat(), torch.zeros(4).cfloat().conj(), (), ["input", "contiguous"]),
        (torch.zeros(5, 2), torch.zeros(5, 2), (), ["output", "[5, 2]", "5 rows", "2 ranks"]),
        (torch.zeros(4), torch.zeros(5), ([2, 2], None), ["input", "[5]", "2 ranks"]),
        (torch.zeros(4), torch.zeros(2), (), ["4 bytes", "8 bytes", "[2]", "[4]"]),
        (torch.zeros(4), torch.zeros(4), ([4], [2, 2]), ["output_split_sizes", "1 entries"]),
        (torch.zeros(4), torch.zeros(4), ([2, 2], [2, 1, 1]), ["input_split_sizes", "3 entries"]),
        (torch.zeros(4), torch.zeros(4), ([2, 3], [2, 2]), ["output", "[2, 3]", "to 5", "4 rows"]),
        (torch.zeros(4), torch.zeros(4), ([2, 2], [2, 1]), ["input", "[2, 1]", "to 3", "4 rows"]),
        (torch.zeros(4), torch.zeros(4), ([5, -1], [5, -1]), ["[5, -1]", "negative"]),
        (torch.zeros(4), torch.zeros(4), ([1, 3], [3, 1]), ["12 bytes", "4 bytes", "[3, 1]"]),
        (_MEMORY, _MEMORY, (), ["96 bytes"]),
        (_MEMORY[2:6], _MEMORY[:4], (), ["48 bytes", "share 24 bytes"]),
        (_MEMORY[:4], _MEMORY[2:6], (), ["48 bytes", "share 24 bytes"]),
    ],
)
def test_refused(
    output: torch.Tensor, input: torch.Tensor, splits: tuple[Any, ...], named: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^all_to_all_single: ") as error:
        check_all_to_all(output, input, 0, 2, *splits)
    for words in named:
        assert words in str(error.value)


def install() -> None:
    """Put the replacements where the plugin puts them, by SGLang's own hooks."""
    targets = {
        "sglang.srt.distributed.parallel_state.GroupCoordinator.all_to_all_single": (
            group_all_to_all_single
        ),
        "sglang.srt.distributed.device_communicators.pynccl.PyNcclCommunicator.all_to_all_single": (
            pynccl_all_to_all_single
        ),
    }
    for target, hook in targets.items():
        HookRegistry.register(target, hook, HookType.REPLACE)
    HookRegistry.apply_hooks()
    assert HookRegistry._patched >= set(targets)


@functools.cache
def build_group(*partition: tuple[int, ...]) -> parallel_state.GroupCoordinator:
    """One of SGLang's groups for each tuple of ranks, with PyNccl where there are GPUs."""
    install()
    nccl = dist.get_backend() == "nccl"
    return parallel_state.init_model_parallel_group(
        [list(ranks) for ranks in partition],
        parallel_state.get_world_group().local_rank,
        dist.get_backend(),
        use_pynccl=nccl,
        use_custom_allreduce=False,
        group_name="kvp",
    )


_worlds: dict[int, World] = {}


@pytest.fixture(scope="module", autouse=True)
def _close_worlds() -> Iterator[None]:
    yield
    for world in _worlds.values():
        world.close()


def on_ranks(function: Any, world_size: int, *args: Any) -> list[Any]:
    """Run over this machine's backend, on ranks that the tests of this module share."""
    backend = collective_backend(world_size) if world_size > 1 else "gloo"
    world = _worlds.get(world_size)
    if world is None or world.closed:
        # NCCL needs longer to start, more so where ranks share a GPU.
        timeout = 60.0 if backend == "gloo" else 240.0
        world = _worlds[world_size] = World(world_size, backend=backend, timeout=timeout)
    return world.run(function, *args)


def needs_gpus(what: str) -> None:
    if torch.cuda.device_count() == 0:
        pytest.skip(f"{what} needs GPUs; the other modes run over gloo here")


multi_rank = pytest.mark.parametrize("world_size", WORLD_SIZES)


def exchange_eagerly(rank: int, world_size: int, *partition: tuple[int, ...]) -> None:
    group = build_group(*partition)
    for case in cases(group.world_size):
        memory = Buffers(case, group.rank_in_group, group.device)
        group.all_to_all_single(memory.output, memory.input, **case.splits(group.rank_in_group))
        memory.check()


@pytest.mark.multi_gpu
@multi_rank
def test_eager(world_size: int) -> None:
    on_ranks(exchange_eagerly, world_size, tuple(range(world_size)))


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    "partition",
    [((0, 2), (1, 3)), ((0, 1), (2, 3)), ((0, 2, 4, 6), (1, 3, 5, 7))],
    ids=["strided", "consecutive", "strided of 8"],
)
def test_groups_inside_a_world(partition: tuple[tuple[int, ...], ...]) -> None:
    on_ranks(exchange_eagerly, sum(map(len, partition)), *partition)


def exchange_in_a_graph(rank: int, world_size: int, nccl_has_all_to_all: bool) -> None:
    group = build_group(tuple(range(world_size)))
    memories = [Buffers(case, rank, group.device) for case in cases(world_size)]

    def exchange() -> None:
        for memory in memories:
            group.all_to_all_single(memory.output, memory.input, **memory.case.splits(rank))

    with (
        group.graph_capture() as context,
        # Only PyNccl may be captured: torch's communicator must not see a single call.
        mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError),
        mock.patch.object(
            pynccl,
            "_nccl_all_to_all",
            pynccl._nccl_all_to_all if nccl_has_all_to_all else lambda library: None,
        ),
    ):
        exchange()  # NCCL connects peers at their first exchange
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=context.stream):
            exchange()
    for salt in (1, 2, 3):
        for memory in memories:
            memory.fill(salt)
        graph.replay()
        torch.cuda.synchronize()
        for memory in memories:
            memory.check(salt)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("nccl_has_all_to_all", [True, False], ids=["ncclAlltoAll", "send, recv"])
@multi_rank
def test_captured_in_a_graph(world_size: int, nccl_has_all_to_all: bool) -> None:
    needs_gpus("a CUDA graph")
    on_ranks(exchange_in_a_graph, world_size, nccl_has_all_to_all)


def exchange_on_a_stream(rank: int, world_size: int) -> None:
    group = build_group(tuple(range(world_size)))
    stream = torch.cuda.Stream()
    for case in cases(world_size):
        memory = Buffers(case, rank, group.device)
        stream.wait_stream(torch.cuda.current_stream())
        with group.pynccl_comm.change_state(enable=True):
            group.pynccl_comm.all_to_all_single(
                memory.output, memory.input, **case.splits(rank), stream=stream
            )
        stream.synchronize()
        memory.check()


@pytest.mark.multi_gpu
@multi_rank
def test_on_a_stream_of_its_own(world_size: int) -> None:
    needs_gpus("a CUDA stream")
    on_ranks(exchange_on_a_stream, world_size)


def refuse_then_exchange(rank: int, world_size: int) -> None:
    group = build_group(tuple(range(world_size)))
    x = torch.full((world_size, 2), float(rank), device=group.device)
    y = torch.empty_like(x)
    for bad in (
        (y[:, :1], x),
        (x, x),
        (y, x.half()),
        (y, x, [1] * world_size, [2] * world_size),
        (y[1:], x[1:]),
    ):
        with pytest.raises(ValueError, match="all_to_all_single"):
            group.all_to_all_single(*bad)
    # Refused before anything was sent: the group still works.
    group.all_to_all_single(y, x)
    assert y[:, 0].tolist() == list(range(world_size))
    # Tensors of the host, in whatever group.
    on_host = torch.empty(world_size, 2)
    group.all_to_all_single(on_host, x.cpu())
    assert torch.equal(on_host, y.cpu())
    with torch.inference_mode():
        group.all_to_all_single(z := torch.empty_like(x), x.clone())
    assert torch.equal(z, y)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_refusal_leaves_the_group_usable(world_size: int) -> None:
    on_ranks(refuse_then_exchange, world_size)


def exchange_on_the_cpu_platform(rank: int, world_size: int) -> None:
    from sglang.srt.platforms import current_platform

    assert current_platform.is_out_of_tree()
    exchange_eagerly(rank, world_size, tuple(range(world_size)))


def test_out_of_tree_cpu_platform() -> None:
    """There SGLang's own custom ops have no kernel for CPU tensors."""
    env = {"SGLANG_PLATFORM": "cpu_reference", "SGLANG_PLUGINS": "cpu_reference"}
    run_ranks(exchange_on_the_cpu_platform, 2, env=env, timeout=120.0)


def exchange_over_the_right_group(rank: int, world_size: int) -> None:
    group = build_group(tuple(range(world_size)))
    x, y = torch.full((world_size,), float(rank)), torch.empty(world_size)
    for device, expected in (("cpu", group.device_group), ("cuda:0", group.cpu_group)):
        with (
            mock.patch.object(group, "device", torch.device(device)),
            mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as call,
        ):
            group.all_to_all_single(y.zero_(), x)
        assert call.call_args.kwargs["group"] is expected
        assert y.tolist() == list(range(world_size))


def test_host_tensors_go_over_gloo_in_a_group_of_accelerators() -> None:
    run_ranks(exchange_over_the_right_group, 2)


def exchange_alone(rank: int, world_size: int) -> None:
    group = build_group((0,))
    for case in cases(2):
        alone = case._replace(rows=[[sum(case.rows[0])]])
        memory = Buffers(alone, 0, group.device)
        group.all_to_all_single(memory.output, memory.input, **alone.splits(0))
        memory.check()
    with pytest.raises(ValueError, match="contiguous"):
        group.all_to_all_single(torch.zeros(2, 2), torch.zeros(2, 2).t())


def test_one_rank_copies() -> None:
    on_ranks(exchange_alone, 1)


def compile_exchange(rank: int, world_size: int) -> None:
    group = build_group(tuple(range(world_size)))
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def even(x: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        group.all_to_all_single(output, x * 2)
        return output + 1

    def uneven(x: torch.Tensor) -> torch.Tensor:
        """Everything to rank 0."""
        rows = x.shape[0]
        received = [rows if rank == 0 else 0] * world_size
        output = x.new_empty(sum(received), *x.shape[1:])
        sent = [rows if peer == 0 else 0 for peer in range(world_size)]
        group.all_to_all_single(output, x * 2, received, sent)
        return output + 1

    for function in (even, uneven):
        graphs.clear()
        x = torch.randn(2 * world_size, 3, device=group.device)
        with torch.inference_mode():
            compiled = torch.compile(function, backend=record, fullgraph=True)(x)
            assert torch.equal(compiled, function(x))
        nodes = [
            node
            for graph in graphs
            for node in graph.graph.nodes
            if "all_to_all" in str(node.target)
        ]
        assert len(graphs) == 1
        assert [node.target for node in nodes] == [torch.ops.sglang_helix.all_to_all_single]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_compile_sees_one_node(world_size: int) -> None:
    on_ranks(compile_exchange, world_size)


def check_op(rank: int, world_size: int) -> None:
    group = build_group((0,))
    op = torch.ops.sglang_helix.all_to_all_single.default
    for splits in ((None, None), ([4], [4])):
        torch.library.opcheck(op, (torch.zeros(4, 2), torch.ones(4, 2), group.unique_name, *splits))
    with pytest.raises(ValueError, match="no process group 'kvp:absent'"):
        op(torch.zeros(2), torch.ones(2), "kvp:absent", None, None)


def test_op_meets_what_torch_asks_of_operators() -> None:
    on_ranks(check_op, 1)


def call_lm_head(rank: int, world_size: int) -> None:
    """Each rank has a vocabulary shard for everybody's rows, and ends with all of its own rows."""
    from sglang.srt.layers.logits_processor import LogitsProcessor

    group = build_group(tuple(range(world_size)))
    rows, shard = 3, 5
    logits = torch.arange(world_size * rows * world_size * shard, device=group.device).float()
    logits = logits.view(world_size * rows, world_size * shard)
    mine = logits[:, rank * shard : (rank + 1) * shard]
    with parallel_state.get_parallel().override(tp_group=group, tp_size=world_size):
        result = LogitsProcessor._tp_lm_head_all_to_all(None, mine)
    assert torch.equal(result, logits[rank * rows : (rank + 1) * rows])


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world_size", [2, 4])
def test_lm_head_caller(world_size: int) -> None:
    on_ranks(call_lm_head, world_size)


def call_npu_merge(rank: int, world_size: int) -> None:
    """Upstream sends [heads, D + 1, tokens] in three dimensions; its NPU kernel is a stand-in."""
    from sglang.srt.layers.dcp.comm import cp_lse_ag_out_rs_mla_npu

    def npu_attention_update(lse: Any, out: Any, update_type: int) -> tuple[torch.Tensor, None]:
        weights = torch.stack(lse).softmax(0)
        return (weights[..., None] * torch.stack(out)).sum(0), None

    torch_npu = types.SimpleNamespace(npu_attention_update=npu_attention_update)
    group = build_group(tuple(range(world_size)))
    tokens, heads, dim = 3, 2 * world_size, 4
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(world_size, tokens, heads, dim, generator=generator).to(group.device)
    lse = torch.randn(world_size, tokens, heads, generator=generator).to(group.device)
    with mock.patch.dict(sys.modules, torch_npu=torch_npu):
        result = cp_lse_ag_out_rs_mla_npu(out[rank], lse[rank], group)
    merged = (lse.softmax(0)[..., None] * out).sum(0)
    torch.testing.assert_close(result, merged[:, rank * 2 : (rank + 1) * 2])


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world_size", [2, 4])
def test_npu_caller(world_size: int) -> None:
    on_ranks(call_npu_merge, world_size)


def call_flat_bytes(rank: int, world_size: int) -> None:
    """``dcp_a2a_lse_reduce`` and XPU: flat bytes, positional, output and input of one shape."""
    group = build_group(tuple(range(world_size)))
    send = torch.full((world_size, 3, 2, 5), float(rank), device=group.device).bfloat16()
    receive = torch.empty_like(send)
    group.all_to_all_single(
        receive.reshape(-1).view(torch.uint8), send.reshape(-1).view(torch.uint8)
    )
    assert torch.equal(receive[:, 0, 0, 0].cpu(), torch.arange(world_size).bfloat16())


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world_size", [2, 3])
def test_flat_byte_callers(world_size: int) -> None:
    on_ranks(call_flat_bytes, world_size)


def prefers_pynccl_when_enabled(rank: int, world_size: int) -> None:
    """The stand-in is on when a graph is captured, and must be the only one called then."""
    group = build_group(tuple(range(world_size)))
    group.pynccl_comm = fake_communicator(rank, world_size)
    x, y = torch.full((world_size,), float(rank)), torch.empty(world_size)
    with mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError):
        group.all_to_all_single(y, x)
        group.all_to_all_single(y, x, [1] * world_size, [1] * world_size)
    names = [call[0] for call in group.pynccl_comm.nccl.calls]
    assert names == ["alltoall", "start", *(["send", "recv"] * world_size), "end"]
    # Upstream warms it up like this, outside of a capture (_prewarm_tp_lm_head_all_to_all).
    group.pynccl_comm.disabled = True
    with group.pynccl_comm.change_state(enable=True):
        group.pynccl_comm.all_to_all_single(y, x)
    assert len(group.pynccl_comm.nccl.calls) == len(names) + 1
    # Off, it is torch.distributed that exchanges.
    group.all_to_all_single(y, x)
    assert y.tolist() == list(range(world_size))


def test_pynccl_only_while_enabled() -> None:
    run_ranks(prefers_pynccl_when_enabled, 2)


def test_signatures_extend_upstreams() -> None:
    """Positions of upstream's parameters stay; ours follow, optional."""
    for ours, theirs in (
        (group_all_to_all_single, parallel_state.GroupCoordinator.all_to_all_single),
        (pynccl_all_to_all_single, PyNcclCommunicator.all_to_all_single),
    ):
        names = list(inspect.signature(ours).parameters.values())
        upstream = list(inspect.signature(theirs).parameters.values())
        assert [p.name for p in names[:3]] == ["self", "output", "input"]
        assert len(upstream) == 3
        assert all(p.default is None for p in itertools.islice(names, 3, None))
