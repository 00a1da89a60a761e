"""Call functions in fresh SGLang processes, each the price of a fork.

Loading plugins, resolving arguments and publishing them change a process for good. A `Fresh` is a
process that has imported what SGLang's launcher and scheduler import, with no plugin loaded yet;
every call happens in a fork of it, or in several that are ranks of one another.

The import costs twenty seconds of CPU time. It happens once for each platform, and once more for
Triton's interpreter, in a run of the tests: a `Fresh` is itself a fork, and so is what servers are
forked from, of a process that all processes of the run share, and that lives as long as they do.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, NamedTuple, Self

from sglang_cpu_reference import PLATFORM_NAME, warm

PRELOAD = (
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
    "sglang.srt.dllm.algorithm",  # every scheduler imports it as it is built
)
_IMPORT_SECONDS = 120


class Outcome(NamedTuple):
    """How a call ended: the process's exit status, what was returned, and all that was written.

    A failure of the function is status 1, its traceback written last by its own process, if not by
    those that outlive it, such as Python's resource tracker; a call that ran out of time is
    status -9.
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
        self._connection, self._pid = _imported(platform, interpreted).fork(
            partial(_serve, tuple(preload))
        )

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


def source() -> warm.Source:
    """What servers are forked from, see `warm`."""
    return warm.Source(_imported(PLATFORM_NAME, False).fork(warm.serve)[0])


@cache
def _imported(platform: str | None, interpreted: bool) -> "_Imported":
    return _Imported(platform, interpreted)


#: Known to the processes of one run: those of pytest-xdist, or this one.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or secrets.token_hex(16)


class _Imported:
    """A process that has imported SGLang on a platform, and forks those of `Fresh`.

    The first of a run's processes to ask for one starts it; it ends when none is connected.
    """

    def __init__(self, platform: str | None, interpreted: bool) -> None:
        # Of Linux's abstract namespace: nothing to remove, and the first to bind it has it.
        self._address = f"\0sglang-helix-{RUN}-{platform}-{interpreted}"
        self._env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        if platform is not None:
            self._env["SGLANG_PLATFORM"] = platform
        if interpreted:  # read as kernels are decorated, at import
            self._env["TRITON_INTERPRET"] = "1"
        self._process: subprocess.Popen[bytes] | None = None
        self._connection = self._connected()

    def fork(self, body: Callable[[Connection], None]) -> tuple[Connection, int]:
        """A new process that runs a function of a connection to it; that, and its id."""
        with Listener(family="AF_UNIX") as listener:
            # Tensors travel as files, to who knows the key.
            key = bytes(multiprocessing.current_process().authkey)
            self._connection.send((listener.address, key, body))
            connection = listener.accept()
        return connection, connection.recv()

    def _connected(self) -> Connection:
        while True:
            # Refused before it listens; lost where it was about to end.
            with contextlib.suppress(ConnectionError, EOFError):
                return Client(self._address, "AF_UNIX", RUN.encode())
            status = self._process.poll() if self._process else 0
            if status:
                raise RuntimeError(f"the process that imports SGLang ended with status {status}")
            if status == 0:
                self._start()
            time.sleep(0.05)

    def _start(self) -> None:
        env = {name: os.environ[name] for name in os.environ if name != "SGLANG_PLATFORM"}
        program = "import pickle, sys; sys.path[:], address, key = pickle.load(sys.stdin.buffer)"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{program}; from {__name__} import main; main(address, key)"],
            env={**env, **self._env},
            stdin=subprocess.PIPE,
        )
        assert self._process.stdin
        self._process.stdin.write(pickle.dumps((sys.path, self._address, RUN.encode())))
        self._process.stdin.flush()  # and stays open


def main(address: str, key: bytes) -> None:
    """Import SGLang, then fork for whoever connects; ends when nobody is connected any more."""
    try:
        listener = Listener(address, "AF_UNIX", 16, key)
    except OSError:  # another process of the run was faster
        return
    starter = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in PRELOAD:
        import_module(name)
    gc.freeze()  # a collection in a fork would look through every module, and copy its pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that it forks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    accepts = listener._listener._socket  # type: ignore[attr-defined]
    users: list[Any] = [starter]
    while users:
        for ready in wait([accepts, *users]):
            if ready is accepts:
                users.append(listener.accept())
                continue
            try:
                request = ready.recv() if ready is not starter else None
            except EOFError:
                request = None
            if request is None:
                ready.close()
                users.remove(ready)
            elif os.fork() == 0:
                for connection in (listener, *users):
                    connection.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                answer_at, key, body = request
                multiprocessing.current_process().authkey = key
                connection = Client(answer_at)
                connection.send(os.getpid())
                body(connection)
                return


def _serve(preload: Sequence[str], connection: Connection) -> None:
    """Body of the process to fork from; ends when who asks does."""
    try:
        for name in preload:
            import_module(name)
        while True:
            what, env, timeout = connection.recv()
            if isinstance(what, tuple):
                connection.send(_called(*what))
            else:
                connection.send(in_forks(what, env, timeout))
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


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
    import torch

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
