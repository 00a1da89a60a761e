"""Call functions in fresh SGLang processes, each the price of a fork.

Loading plugins, resolving arguments and publishing them change a process for good. A `Fresh` is a
process that has imported what SGLang's launcher and scheduler import, with no plugin loaded yet;
every call happens in a fork of it, or in several that are ranks of one another.
"""

import multiprocessing
import os
import pickle
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self
from unittest import mock

_PRELOAD = (
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
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
        preload: modules to import beside SGLang's, by name, before any fork.
        variables: of the environment, for the process and all of its forks.
    """

    def __init__(
        self,
        platform: str | None = None,
        timeout: float = 240,
        preload: Sequence[str] = (),
        **variables: str,
    ) -> None:
        self.timeout = timeout
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, preload), daemon=True)
        env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        env.update(variables)
        with mock.patch.dict(os.environ, env):
            os.environ.pop("SGLANG_PLATFORM", None)
            if platform is not None:
                os.environ["SGLANG_PLATFORM"] = platform
            self._process.start()
        theirs.close()

    def outcomes(
        self, functions: list[tuple[Any, ...]], env: Mapping[str, str] | None = None
    ) -> list[Outcome]:
        """Call several module-level functions, given with their arguments, at the same time.

        env: environment variables that the new processes have beside this one's.
        """
        self._connection.send((functions, dict(env or {}), self.timeout))
        if not self._connection.poll(self.timeout + _IMPORT_SECONDS):
            self._process.kill()  # a late answer would be taken for the next call's
            raise TimeoutError("no answer")
        return [Outcome(*outcome) for outcome in self._connection.recv()]

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


def _value(outcome: Outcome) -> Any:
    assert outcome.status == 0, outcome.output
    return outcome.value


def _serve(connection: Connection, preload: Sequence[str]) -> None:
    """Body of the process to fork from; ends when its parent does."""
    for name in (*_PRELOAD, *preload):
        import_module(name)
    while True:
        try:
            functions, env, timeout = connection.recv()
        except EOFError:
            return
        deadline = time.monotonic() + timeout
        forks = [_Fork(function, args, env) for function, *args in functions]
        connection.send([fork.wait(deadline) for fork in forks])


class _Fork:
    def __init__(self, function: Callable[..., Any], args: list[Any], env: dict[str, str]) -> None:
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
