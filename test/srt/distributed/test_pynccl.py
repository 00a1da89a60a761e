"""All-to-all over NCCL, on a stand-in for the library."""

import ctypes
import random
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.distributed.device_communicators.pynccl_wrapper import (
    NCCLLibrary,
)
from sglang_helix.srt.distributed.device_communicators import pynccl
from sglang_helix.srt.distributed.device_communicators.pynccl import pynccl_all_to_all_single
from srt.distributed.all_to_all_cases import Buffers, Case, cases, generate_case
from srt.distributed.fake_nccl import COMM, STREAM, UINT8, FakeLibrary, deliver, fake_communicator


def exchange_on_fakes(case: Case, version: int) -> list[FakeLibrary]:
    world_size = len(case.rows)
    libraries = [FakeLibrary(version) for _ in range(world_size)]
    buffers = [Buffers(case, rank) for rank in range(world_size)]
    for rank, (library, memory) in enumerate(zip(libraries, buffers, strict=True)):
        pynccl_all_to_all_single(
            fake_communicator(rank, world_size, library),
            memory.output,
            memory.input,
            **case.splits(rank),
        )
    deliver(libraries)
    for memory in buffers:
        memory.check()
    return libraries


@pytest.mark.parametrize("version", [22707, 22800])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_nccl_delivers(world_size: int, version: int) -> None:
    for case in cases(world_size):
        exchange_on_fakes(case, version)


@given(st.integers(1, 9), st.randoms(use_true_random=False), st.sampled_from([22707, 22800]))
@settings(deadline=None, max_examples=200)
def test_nccl_delivers_generated(world_size: int, rng: random.Random, version: int) -> None:
    case = generate_case(rng, world_size)
    for library in exchange_on_fakes(case, version):
        for name, *args in library.calls:
            if name in ("send", "recv"):
                assert args[1] > 0, "an empty chunk was not skipped"
                assert args[2:3] + args[4:] == [UINT8, COMM, STREAM]


def test_even_splits_are_one_nccl_all_to_all() -> None:
    memory = Buffers(Case([[2, 2], [2, 2]], (3,), torch.float8_e4m3fn, False, 0), 1)
    comm = fake_communicator(1, 2)
    for _ in range(3):
        pynccl_all_to_all_single(comm, memory.output, memory.input)
    pointers = memory.input.data_ptr(), memory.output.data_ptr()
    assert comm.nccl.calls == [("alltoall", *pointers, 6, UINT8, COMM, STREAM)] * 3
    assert comm.nccl.version_queries == 1
    # What ctypes needs to pass 64-bit pointers and sizes.
    assert comm.nccl.lib.ncclAlltoAll.argtypes[2] is ctypes.c_size_t


@pytest.mark.parametrize("library", [FakeLibrary(22799), FakeLibrary(22800, has_all_to_all=False)])
def test_even_splits_without_nccl_all_to_all(library: FakeLibrary) -> None:
    memory = Buffers(Case([[2, 2], [2, 2]], (3,), torch.bfloat16, False, 0), 1)
    pynccl_all_to_all_single(fake_communicator(1, 2, library), memory.output, memory.input)
    source, target = memory.input.data_ptr(), memory.output.data_ptr()
    assert library.calls == [
        ("start",),
        ("send", source, 12, UINT8, 0, COMM, STREAM),
        ("recv", target, 12, UINT8, 0, COMM, STREAM),
        ("send", source + 12, 12, UINT8, 1, COMM, STREAM),
        ("recv", target + 12, 12, UINT8, 1, COMM, STREAM),
        ("end",),
    ]


def test_explicit_splits_are_grouped_and_skip_what_is_empty() -> None:
    case = Case([[1, 0, 2], [3, 0, 0], [0, 4, 0]], (2,), torch.float32, True, 0)
    memory, comm = Buffers(case, 0), fake_communicator(0, 3)
    pynccl_all_to_all_single(comm, memory.output, memory.input, [1, 3, 0], [1, 0, 2])
    source, target = memory.input.data_ptr(), memory.output.data_ptr()
    assert comm.nccl.calls == [
        ("start",),
        ("send", source, 8, UINT8, 0, COMM, STREAM),
        ("recv", target, 8, UINT8, 0, COMM, STREAM),
        ("recv", target + 8, 24, UINT8, 1, COMM, STREAM),
        ("send", source + 8, 16, UINT8, 2, COMM, STREAM),
        ("end",),
    ]


def test_explicit_splits_never_mix_with_nccl_all_to_all() -> None:
    """Rank 0 sees even splits only, rank 1 does not: both have to make the same NCCL calls."""
    libraries = exchange_on_fakes(Case([[2, 2], [2, 3]], (), torch.uint8, True, 0), 22800)
    assert [library.calls[0] for library in libraries] == [("start",), ("start",)]


def test_nothing_to_exchange_calls_no_collective() -> None:
    comm = fake_communicator(0, 2)
    pynccl_all_to_all_single(comm, torch.zeros(0, 4), torch.zeros(0, 4))
    assert comm.nccl.calls == []


@pytest.mark.parametrize("version", [22707, 22800])
def test_stream_is_passed(version: int) -> None:
    comm = fake_communicator(0, 2, FakeLibrary(version))
    stream = types.SimpleNamespace(cuda_stream=99)
    pynccl_all_to_all_single(comm, torch.zeros(4), torch.ones(4), stream=stream)
    assert {call[-1] for call in comm.nccl.calls if len(call) > 1} == {99}


def test_disabled_communicator_raises() -> None:
    output, comm = torch.zeros(4), fake_communicator(1, 2)
    with comm.change_state(enable=False), pytest.raises(RuntimeError, match="rank 1 of 2 is disab"):
        pynccl_all_to_all_single(comm, output, torch.ones(4))
    comm.available = False
    with comm.change_state(enable=True), pytest.raises(RuntimeError, match="is not available"):
        pynccl_all_to_all_single(comm, output, torch.ones(4))
    assert comm.nccl.calls == []


def test_nccl_refuses_another_device_and_bad_tensors() -> None:
    comm = fake_communicator(0, 2)
    comm.device = torch.device("cuda:3")
    with pytest.raises(ValueError, match=r"input is on cpu .* serves cuda:3"):
        pynccl_all_to_all_single(comm, torch.zeros(4), torch.ones(4))
    comm.device = torch.device("cpu")
    with pytest.raises(ValueError, match="12 rows"):
        pynccl_all_to_all_single(comm, torch.zeros(12), torch.ones(12), [5, 6], [6, 6])
    assert comm.nccl.calls == []


@pytest.mark.parametrize("fails", ["alltoall", "send", "recv"])
def test_nccl_errors_are_raised_and_close_the_group(fails: str) -> None:
    comm = fake_communicator(0, 2, FakeLibrary(22800 if fails == "alltoall" else 22707))
    comm.nccl.fails = fails
    with pytest.raises(RuntimeError, match="NCCL error"):
        pynccl_all_to_all_single(comm, torch.zeros(4), torch.ones(4))
    names = [call[0] for call in comm.nccl.calls]
    assert names.count("start") == names.count("end")
    assert names[-1] == ("alltoall" if fails == "alltoall" else "end")


def test_installed_nccl_has_all_to_all() -> None:
    """The pinned SGLang brings an NCCL that has it, where torch was built for CUDA."""
    try:
        library = NCCLLibrary()
    except (OSError, ValueError) as error:
        pytest.skip(f"no NCCL to load: {error}")
    if library.ncclGetRawVersion() < 22800:
        pytest.skip(f"NCCL {library.ncclGetVersion()} is older than 2.28")
    function = pynccl._nccl_all_to_all(library)
    assert function is not None
    # The same function upstream binds its others from, so the signature has their types.
    assert function.argtypes[0] is library._funcs["ncclSend"].argtypes[0]
