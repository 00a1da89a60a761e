"""A stand-in for NCCL, which moves the bytes of all-to-alls between ranks of one process."""

import ctypes
import types
from collections import defaultdict
from typing import Any

import torch
from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator
from sglang.srt.distributed.device_communicators.pynccl_wrapper import (
    ncclDataTypeEnum,
)


class FakeLibrary:
    """NCCL as far as an all-to-all sees it, for one rank; calls wait in ``calls``."""

    def __init__(self, version: int, has_all_to_all: bool = True) -> None:
        self.version = version
        self.version_queries = 0
        self.calls: list[tuple[Any, ...]] = []
        self.fails: str | None = None
        self.lib = types.SimpleNamespace()
        if has_all_to_all:

            def all_to_all(*args: Any) -> int:
                return self._call("alltoall", *args)

            self.lib.ncclAlltoAll = all_to_all

    def ncclGetRawVersion(self) -> int:  # noqa: N802
        self.version_queries += 1
        return self.version

    def NCCL_CHECK(self, result: int) -> None:  # noqa: N802
        if result:
            raise RuntimeError(f"NCCL error {result}")

    def _call(self, name: str, *args: Any) -> int:
        self.calls.append((name, *(getattr(arg, "value", arg) for arg in args)))
        return int(name == self.fails)

    def ncclGroupStart(self) -> None:  # noqa: N802
        self.NCCL_CHECK(self._call("start"))

    def ncclGroupEnd(self) -> None:  # noqa: N802
        self.NCCL_CHECK(self._call("end"))

    def ncclSend(self, *args: Any) -> None:  # noqa: N802
        self.NCCL_CHECK(self._call("send", *args))

    def ncclRecv(self, *args: Any) -> None:  # noqa: N802
        self.NCCL_CHECK(self._call("recv", *args))


COMM, STREAM = 77, 1234
UINT8 = ncclDataTypeEnum.ncclUint8


def fake_communicator(
    rank: int, world_size: int, library: FakeLibrary | None = None
) -> PyNcclCommunicator:
    comm = PyNcclCommunicator.__new__(PyNcclCommunicator)
    comm.rank, comm.world_size, comm.device = rank, world_size, torch.device("cpu")
    comm.nccl, comm.comm = library or FakeLibrary(22800), COMM
    comm.available, comm.disabled = True, False
    comm._resolve_stream = lambda: types.SimpleNamespace(cuda_stream=STREAM)
    return comm


def deliver(libraries: list[FakeLibrary]) -> None:
    """Do what NCCL promises for the recorded calls: match sends and receives in order."""
    in_flight: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    receives = []
    for rank, library in enumerate(libraries):
        for name, *args in library.calls:
            if name == "alltoall":
                send_at, receive_at, count = args[:3]
                for peer in range(len(libraries)):
                    in_flight[rank, peer].append((send_at + peer * count, count))
                    receives.append((peer, rank, receive_at + peer * count, count))
            elif name == "send":
                in_flight[rank, args[3]].append((args[0], args[1]))
            elif name == "recv":
                receives.append((args[3], rank, args[0], args[1]))
    for source, rank, receive_at, count in receives:
        send_at, sent = in_flight[source, rank].pop(0)
        assert sent == count
        ctypes.memmove(receive_at, send_at, count)
    assert not any(in_flight.values()), "a send nobody received"
