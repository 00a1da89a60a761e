"""Call functions in fresh SGLang processes, each the price of a fork.

Loading plugins, resolving arguments and publishing them change a process for good. A `Fresh` is a
process that has imported what SGLang's launcher and scheduler import, with no plugin loaded yet;
every call happens in a fork of it, or in several that are ranks of one another.

The import costs twenty seconds of CPU time. It happens once for each platform, and once more for
Triton's interpreter: a `Fresh` is itself a fork, of a process that lives as long as this one.
"""

import gc
import multiprocessing
import os
import pickle
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NamedTuple, Self
from unittest import mock

import torch

PRELOAD = (
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
    "sglang.srt.dllm.algorithm",  # every scheduler imports it as it is built
)
_IMPORT_SECONDS = 120


class Outcome(NamedTuple):
    """How a call ended: the process's exit status, what was returned, and all that was written.

    A failure of the function is status 1, its traceback the last thing written; a call that ran
    out of time is status -9.
    """

    status: int
    value: Any
    output: str


class Fresh:
    """A process to fork from. Use it in a ``with`` statement.

    Args:
        platform: value of SGLANG_PLATFORM; None leaves the choice to SGLang.
        timeout: seconds that a call may take; only what hangs should meet it, also where the
            machine has other work.
        preload: modules to import after SGLang's, by name, before any fork.
        interpreted: whether Triton's kernels are run by its interpreter, on the CPU.
    """

    def __init__(
        self,
        platform: str | None = None,
        timeout: float = 240,
        preload: Sequence[str] = (),
        interpreted: bool = False,
    ) -> None:
        self.timeout = timeout
        self._connection, self._pid = _imported(platform, interpreted).fork(preload)

    def outcomes(
        self, functions: list[tuple[Any, ...]], env: Mapping[str, str] | None = None
    ) -> list[Outcome]:
        """Call several module-level functions, given with their arguments, at the same time.

        env: environment variables that the new processes have beside this one's.
        """
        return [Outcome(*outcome) for outcome in self._ask(functions, dict(env or {}))]

    def outcome(self, function: Callable[..., Any], *args: Any, **env: str) -> Outcome:
        """Call one function."""
        return self.outcomes([(function, *args)], env)[0]

    def value(self, function: Callable[..., Any], *args: Any, **env: str) -> Any:
        """What the function returns; raises AssertionError where it does not."""
        return _value(self.outcome(function, *args, **env))

    def ranks(self, function: Callable[..., Any], size: int, *args: Any, **env: str) -> list[Any]:
        """What ``function(rank, *args)`` returns on each of several ranks."""
        calls = [(function, rank, *args) for rank in range(size)]
        return [_value(outcome) for outcome in self.outcomes(calls, env)]

    def here(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns, called in the process itself: it must leave nothing behind."""
        return _value(Outcome(*self._ask((function, *args), {})))

    def _ask(self, what: Any, env: dict[str, str]) -> Any:
        self._connection.send((what, env, self.timeout))
        if not self._connection.poll(self.timeout + _IMPORT_SECONDS):
            os.kill(self._pid, signal.SIGKILL)  # a late answer would be taken for the next call's
            raise TimeoutError("no answer")
        return self._connection.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()


def _value(outcome: Outcome) -> Any:
    assert outcome.status == 0, outcome.output
    return outcome.value


@cache
def _imported(platform: str | None, interpreted: bool) -> "_Imported":
    return _Imported(platform, interpreted)


class _Imported:
    """A process that has imported SGLang on a platform, and forks those of `Fresh`."""

    def __init__(self, platform: str | None, interpreted: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_fork_each, args=(theirs,), daemon=True)
        env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with mock.patch.dict(os.environ, env):
            os.environ.pop("SGLANG_PLATFORM", None)
            if platform is not None:
                os.environ["SGLANG_PLATFORM"] = platform
            if interpreted:  # read as kernels are decorated, at import
                os.environ["TRITON_INTERPRET"] = "1"
            process.start()
        theirs.close()

    def fork(self, preload: Sequence[str]) -> tuple[Connection, int]:
        """A new process that answers, and its id."""
        with Listener(family="AF_UNIX") as listener:
            self._connection.send((listener.address, tuple(preload)))
            connection = listener.accept()
        return connection, connection.recv()


def _fork_each(connection: Connection) -> None:
    """Body of a process that has imported SGLang; ends when its parent does."""
    for name in PRELOAD:
        import_module(name)
    gc.freeze()  # a collection in a fork would look through every module, and copy its pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that it forks
    while True:
        try:
            address, preload = connection.recv()
        except EOFError:
            return
        if os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _serve(Client(address), preload)
            finally:
                os._exit(0)


def _serve(connection: Connection, preload: Sequence[str]) -> None:
    """Body of the process to fork from; ends when who asks does."""
    connection.send(os.getpid())
    for name in preload:
        import_module(name)
    while True:
        try:
            what, env, timeout = connection.recv()
        except EOFError:
            return
        if isinstance(what, tuple):
            connection.send(_called(*what))
            continue
        connection.send(in_forks(what, env, timeout))


def in_forks(
    functions: list[tuple[Any, ...]], env: Mapping[str, str], timeout: float
) -> list[tuple[int, Any, str]]:
    """How calls in forks of this process ended, all at the same time; see `Outcome`."""
    deadline = time.monotonic() + timeout
    forks = [_Fork(function, args, env) for function, *args in functions]
    return [fork.wait(deadline) for fork in forks]


def _called(function: Callable[..., Any], *args: Any) -> Outcome:
    try:
        return Outcome(0, function(*args), "")
    except Exception:
        return Outcome(1, None, traceback.format_exc())


class _Fork:
    def __init__(
        self, function: Callable[..., Any], args: list[Any], env: Mapping[str, str]
    ) -> None:
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed in `wait`
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.output.fileno(), 2)
            os.environ.update(env)
            _run(function, args, writer)
        os.close(writer)
        self.answer = open(reader, "rb", buffering=0)  # noqa: SIM115 closed in `wait`

    def wait(self, deadline: float) -> tuple[int, Any, str]:
        with self.answer, self.output:
            answer = b""
            while select.select([self.answer], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if not (part := self.answer.read(1 << 16)):
                    break
                answer += part
            else:
                os.kill(self.pid, signal.SIGKILL)
                answer = b""
            _, status = os.waitpid(self.pid, 0)
            self.output.seek(0)
            code = os.waitstatus_to_exitcode(status)
            return code, pickle.loads(answer) if answer else None, self.output.read()


def _run(function: Callable[..., Any], args: list[Any], writer: int) -> None:
    """Body of a fork; ends the process."""
    status = 0
    # The first to ask torch for its thread pool after a fork makes a new one, and who asks
    # meanwhile finds none ("Invalid thread pool!"): ranks that are threads would.
    torch.set_num_threads(torch.get_num_threads())
    try:
        answer = pickle.dumps(function(*args))
        with open(writer, "wb") as stream:
            stream.write(answer)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code, flush=True)
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)
