"""Wait for what a server says, not for seconds: how long it takes is the machine's affair."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
