"""Imported by the fork server, and by nothing else: prepares it to stand between SGLang processes.

See forkserver.py.
"""

import os
import signal


def _pass_on(signum: int, _frame: object) -> None:
    os.kill(os.getppid(), signum)


# A failing rank signals its parent; the launcher is waiting for that.
signal.signal(signal.SIGQUIT, _pass_on)
