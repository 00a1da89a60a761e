"""Servers forked from a process that has imported SGLang, so that a start costs no imports.

A server's launcher and its fork server (see `forkserver`) each spend ten seconds of CPU time
importing SGLang, and a run of the tests starts dozens of servers. Here a process imports what both
import, before any plugin is loaded, and forks: the child is the launcher, becomes what
``python -m sglang.launch_server`` is, and forks the fork server of its ranks before it does
anything. From there on all is as after a cold start, but for the modules that are imported earlier.

One such process lives as long as the one that uses it; `make` may be another way to one.
"""

import gc
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from sglang_cpu_reference import PLATFORM_NAME, forkserver

_MODULE = "sglang.launch_server"
# A rank imports every model, a second time as long as all before it; here it has them already.
_IMPORTED = (
    "sglang.srt.entrypoints.http_server",
    *forkserver.PRELOADED,
    "sglang.srt.models.registry",
)


class Forked:
    """A server's launcher, with what is used here of `subprocess.Popen`."""

    def __init__(self, source: "Source", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._source = source

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            try:
                self.returncode = self._source.ask("status", self.pid)
            except (EOFError, OSError):  # the source is gone, and its forks died with it
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one; raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(_MODULE, timeout or 0.0)
            time.sleep(0.05)
        return status

    def terminate(self) -> None:
        """Ask it to end, unless it is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


class Source:
    """A process that servers are forked from: it runs `serve`, and ends with its user."""

    def __init__(
        self, connection: Connection, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._connection = connection
        self._process = process  # is reaped with this one

    def alive(self) -> bool:
        """Whether it can still fork: it says nothing unasked, so what can be read is its end."""
        with self._lock:
            return not self._connection.poll()

    def start(
        self, flags: Sequence[str], env: Mapping[str, str], log: Path, prelude: str = ""
    ) -> Forked:
        """``python -m sglang.launch_server`` with these flags, in a session of its own.

        prelude: Python code that the launcher runs first, before its ranks are forked from it.
        """
        given = (list(flags), dict(env), os.getcwd(), str(log), prelude)
        return Forked(self, self.ask("start", *given))

    def ask(self, *question: Any) -> Any:
        """What the process answers; raises EOFError when it is gone."""
        with self._lock:
            self._connection.send(question)
            return self._connection.recv()


def started() -> Source:
    """A new process with this one's environment, on the CPU platform."""
    connection, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "SGLANG_PLATFORM": PLATFORM_NAME},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    return Source(connection, process)


#: What makes this process's own source, on the first call of `source`.
make: Callable[[], Source] = started
_source: Source | None = None


def source() -> Source:
    """This process's own."""
    global _source
    if _source is None or not _source.alive():
        _source = make()
    return _source


def serve(connection: Connection) -> None:
    """Import, then fork a server for each request; returns in a server that has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks, and has its forks end
    for name in _IMPORTED:
        import_module(name)
    gc.freeze()  # a collection in a fork would copy the pages of every module
    while True:
        try:
            what, *arguments = connection.recv()
        except EOFError:
            return
        if what == "status":
            pid, status = os.waitpid(arguments[0], os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
        elif pid := os.fork():
            connection.send(pid)
        else:
            connection.close()
            _launch(*arguments)
            return


def _launch(flags: list[str], env: dict[str, str], folder: str, log: str, prelude: str) -> None:
    """In a fork: be the launcher."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    forkserver.die_with_parent()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    exec(prelude, {})
    forkserver.fork()
    sys.argv[1:] = flags  # run_module sets the first
    runpy.run_module(_MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
