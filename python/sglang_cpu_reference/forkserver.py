"""Start the ranks by forking a process that has imported SGLang already.

SGLang spawns every rank, and each then spends about ten seconds of CPU time importing the same
modules: on a small machine that is most of a server's start. Python's own fork server imports them
once, beside the launcher's imports; a rank is then a fork, and shares that memory too.

Two things differ from a spawned child, and are made up for here. The fork server's environment is
the launcher's of an earlier moment, so each child is sent the launcher's at the time it is started.
And a rank's parent is the fork server: the signal that SGLang sends to its parent when a rank fails
is passed on, and as a rank dies with its parent, the fork server dies with the launcher.

What is preloaded is what a spawned rank has imported by the time it loads plugins, not more: hooks
meet the same modules as under spawn.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

_libc = ctypes.CDLL(None)
# The process, by its target's name, that starts the ranks where there are replicas.
_STARTS_RANKS = "run_data_parallel_controller_process"
PRELOADED = ("sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager")


def start_early() -> None:
    """In the command line launcher: begin the preload beside the launcher's own imports."""
    # Not by __main__: this runs while python -m still imports the package it finds the module in.
    if "sglang.launch_server" in sys.orig_argv:
        _start()


def use(*_ignored: object) -> None:
    """From now on ``multiprocessing.Process`` forks the server; follows SGLang's set to spawn."""
    _start()
    # set_start_method takes names only, and ours is not one that multiprocessing knows.
    multiprocessing.context._default_context._actual_context = _Context()  # type: ignore[attr-defined]


def fork() -> None:
    """Let a fork of this process, which has imported all that is preloaded, be the fork server."""
    server: Any = multiprocessing.forkserver._forkserver
    address = multiprocessing.connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen()
        alive_reader, alive_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(alive_writer)
                stand_between()
                multiprocessing.forkserver.main(listener.fileno(), alive_reader, preload=[])
            finally:
                os._exit(0)
        os.close(alive_reader)
    server._forkserver_address = address
    server._forkserver_alive_fd = alive_writer
    server._forkserver_pid = pid


def stand_between() -> None:
    """In the fork server, between the launcher and its ranks."""
    die_with_parent()
    signal.signal(signal.SIGQUIT, lambda number, _frame: os.kill(os.getppid(), number))


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        _libc.prctl(set_parent_death_signal, signal.SIGKILL)


def _start() -> None:
    multiprocessing.forkserver.set_forkserver_preload([f"{__package__}.preload", *PRELOADED])
    multiprocessing.forkserver.ensure_running()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        target = process_obj._target
        process_obj._target = partial(_run, dict(os.environ), target)
        return ForkServerProcess._Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Process


def _run(environ: Mapping[str, str], target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the child."""
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update(environ)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    if target.__name__ == _STARTS_RANKS:
        fork()
        use()
    return target(*args, **kwargs)
