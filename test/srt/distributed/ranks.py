"""Run functions on several ranks, each a process of its own, and collect what they return."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self, TextIO
from unittest import mock

import pytest
import torch

SHARE_GPUS = "HELIX_TEST_SHARE_GPUS"

#: What a fork server imports once for all ranks; a rank on its own would need seconds for it.
_PRELOAD = [
    "hypothesis",
    "pytest",
    "sglang.srt.layers.logits_processor",
    "sglang_helix.srt.distributed.device_communicators.pynccl",
]

#: How long the other ranks may still tell their story after the first one failed.
_GRACE_SECONDS = 1.0


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds the story of each that did."""


def collective_backend(world_size: int) -> str:
    """Return "nccl" where there are GPUs and "gloo" where there are none.

    Skips the calling test where the GPUs are too few: ranks share them only when the environment
    variable HELIX_TEST_SHARE_GPUS is 1, and only with NCCL 2.30 or newer.
    """
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return "gloo"
    if world_size > gpus:
        if os.environ.get(SHARE_GPUS) != "1":
            pytest.skip(
                f"{world_size} ranks need {world_size} GPUs, there are {gpus}; "
                f"{SHARE_GPUS}=1 lets ranks share them"
            )
        if torch.cuda.nccl.version() < (2, 30):
            pytest.skip(
                f"ranks share a GPU only from NCCL 2.30 on, this is {torch.cuda.nccl.version()}"
            )
    return "nccl"


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    timeout: float = 240.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` once on the ranks of a new ``World``."""
    with World(world_size, backend=backend, timeout=timeout, env=env) as world:
        return world.run(function, *args)


class World:
    """Ranks that stay for several runs, so that start-up is paid once.

    Every rank has SGLang's distributed environment (its world group). Use it in a ``with``
    statement, or call ``close``; after a failure it is closed already.

    Args:
        world_size: number of ranks.
        backend: "gloo" or "nccl"; with "nccl", rank r uses GPU r modulo the number of GPUs.
        timeout: seconds that each run may take, the first with start-up; then the ranks are killed.
        env: environment variables the ranks start with. They then import everything afresh, in
            time for what reads its environment at import, and seconds slower. Without it, ranks
            may have the environment of the session's first world, whatever a test set since.
            Where SGLANG_PLATFORM is set, ranks load SGLang's plugins (SGLANG_PLUGINS limits them).
    """

    def __init__(
        self,
        world_size: int,
        backend: str = "gloo",
        timeout: float = 240.0,
        env: dict[str, str] | None = None,
    ) -> None:
        self.closed = False
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        if backend == "nccl" and world_size > torch.cuda.device_count():
            # A few blocks per rank, or ranks that share a GPU fill it and wait for each other.
            sharing = {
                "NCCL_MULTI_RANK_GPU_ENABLE": "1",
                "NCCL_MAX_CTAS": "4",
                "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
            }
            env = {**sharing, **(env or {})}
        # Forking is unsafe once something in the fork server has asked CUDA for its devices.
        fresh = bool(env) or torch.cuda.device_count() > 0
        context = multiprocessing.get_context("spawn" if fresh else "forkserver")
        context.set_forkserver_preload(_PRELOAD)
        try:
            with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **(env or {})}):
                for rank in range(world_size):
                    ours, theirs = context.Pipe()
                    self._connections.append(ours)
                    process = context.Process(
                        target=_run_rank,
                        args=(theirs, rank, world_size, backend, self._folder.name, timeout),
                        daemon=True,
                    )
                    process.start()
                    theirs.close()
                    self._processes.append(process)
        except BaseException:
            self.close()
            raise

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float | None = None
    ) -> list[Any]:
        """Call ``function(rank, world_size, *args)`` on every rank; return the results by rank.

        Function, arguments and results are pickled, so the function stands at the top level of a
        module. timeout: of this run, where it is not the world's.

        Raises:
            RankError: a rank raised, died or ran out of time; the world is closed.
        """
        timeout = timeout or self._timeout
        deadline = time.monotonic() + timeout
        outcomes: dict[int, tuple[bool, Any]] = {}
        try:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # it died; what it said is read below
                    connection.send((function, args, timeout))
            waiting = {connection: rank for rank, connection in enumerate(self._connections)}
            while waiting and time.monotonic() < deadline:
                for ready in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                    rank = waiting.pop(ready)
                    try:
                        outcomes[rank] = ready.recv()
                    except (EOFError, OSError):
                        outcomes[rank] = (False, f"died; {self._last_words(rank)}")
                    if not outcomes[rank][0]:
                        deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            for rank in waiting.values():
                outcomes[rank] = (False, f"did not finish; {self._last_words(rank)}")
            failures = [
                f"rank {rank} of {len(self._processes)}: {story}"
                for rank, (succeeded, story) in sorted(outcomes.items())
                if not succeeded
            ]
            if failures:
                raise RankError("\n".join(failures))
        except BaseException:
            self.close()
            raise
        return [result for _, (_, result) in sorted(outcomes.items())]

    def close(self) -> None:
        """End the ranks; none is left behind."""
        self.closed = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _last_words(self, rank: int) -> str:
        """Where faulthandler last saw the rank: on a crash, or shortly before time was up."""
        path = _stack_file(self._folder.name, rank)
        return (path.read_text() if path.exists() else "") or "its stack is not known"


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"rank{rank}.stack")


def _run_rank(
    connection: Connection, rank: int, world_size: int, backend: str, folder: str, timeout: float
) -> None:
    """Body of a rank's process: run what arrives until the parent is gone or something fails."""
    stack = _stack_file(folder, rank).open("w")
    faulthandler.enable(stack)
    try:
        with _limited(timeout, stack):
            _join_world(rank, world_size, backend, folder, timeout)
        while True:
            try:
                function, args, limit = connection.recv()
            except EOFError:
                break
            with _limited(limit, stack):
                connection.send((True, function(rank, world_size, *args)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    # No teardown: it is a collective, and a rank may be gone.
    os._exit(0)


@contextlib.contextmanager
def _limited(timeout: float, stack: TextIO) -> Iterator[None]:
    """Whatever becomes of the parent, no rank outlives its time; one that is late says where."""
    faulthandler.dump_traceback_later(timeout * 0.9, file=stack)
    signal.alarm(int(timeout) + 10)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)


def _join_world(rank: int, world_size: int, backend: str, folder: str, timeout: float) -> None:
    """Build SGLang's distributed environment; a file is the meeting point, no port can collide."""
    from sglang.srt.distributed.parallel_state import init_distributed_environment
    from sglang.srt.plugins import load_plugins

    torch.set_num_threads(1)
    if os.environ.get("SGLANG_PLATFORM"):
        # A platform may bring hooks, and refuse to build groups without them.
        load_plugins()
    local_rank = rank
    if backend == "nccl":
        local_rank = rank % torch.cuda.device_count()
        torch.cuda.set_device(local_rank)
    init_distributed_environment(
        world_size=world_size,
        rank=rank,
        distributed_init_method=f"file://{folder}/store",
        local_rank=local_rank,
        backend=backend,
        timeout=max(1, int(timeout)),
    )
