"""A `python` for the scripts of `examples/`, whose servers are forked as those of `Server` are."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from srt.fresh import RUN, source


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """The environment in which a script's `python` is `main`, and otherwise this interpreter."""
    with TemporaryDirectory() as folder:
        python = Path(folder, "python")
        python.write_text(f"#!{sys.executable}\nfrom {__name__} import main\nmain()\n")
        python.chmod(0o755)
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        modules = os.pathsep.join(entry for entry in sys.path if entry)
        run = {"PYTEST_XDIST_TESTRUNUID": RUN}
        yield {**os.environ, "PATH": path, "PYTHONPATH": modules, **run}


def main() -> None:
    """``python -m sglang.launch_server`` with its output in a file is forked from the run's."""
    if sys.argv[1:3] != ["-m", "sglang.launch_server"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    log = Path("/proc/self/fd/1").resolve()
    server = source().start(sys.argv[3:], os.environ, log)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(server.pid, signal.SIGTERM))
    sys.exit(server.wait())
