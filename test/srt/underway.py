"""Wait for what a server says, not for seconds: how long it takes is the machine's affair."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
from sglang_cpu_reference.server import Server

_SECONDS = 120


def wait_until(condition: Callable[[], object]) -> None:
    """Return as soon as it holds; AssertionError where it never does."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {_SECONDS} s"
        time.sleep(0.05)


@contextmanager
def prompts_are_taken(server: Server, number: int = 1) -> Iterator[None]:
    """What is within sends prompts; leave once the server has begun to compute so many."""

    def taken() -> int:
        return sum(map(int, re.findall(r"Prefill batch, #new-seq: (\d+)", server.log())))

    before = taken()
    yield
    wait_until(lambda: taken() >= before + number)


def scheduler_pid(session: int, rank: int) -> int:
    """Process of a server's rank: the fork server, the launcher's child, starts them in order."""
    family = psutil.Process(session).children(recursive=True)
    return sorted(process.pid for process in family if process.ppid() != session)[rank]


@contextmanager
def nothing_left_of(server: Server) -> Iterator[None]:
    """Serve, then see every process of the server gone, and nobody at its port."""
    with server:
        launcher = psutil.Process(server.session)
        processes = [launcher, *launcher.children(recursive=True)]
        assert len(processes) > 3
        yield
    wait_until(lambda: all(map(_has_ended, processes)))
    with (
        pytest.raises(OSError, match="refused"),
        socket.create_connection(("127.0.0.1", server.port)),
    ):
        pass


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
