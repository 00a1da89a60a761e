"""Steps that take a while, on stderr, each line with an estimate of the time that is left."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Progress:
    """Steps in their order.

    expected: about how many seconds each takes. begin: seconds that the first takes besides. What
    a step has taken sets the pace of those that are left.
    """

    def __init__(self, expected: Mapping[str, float], begin: float = 0) -> None:
        self._names = list(expected)
        self._expected = list(expected.values())
        self._expected[0] += begin
        self._done = 0
        self._taken = 0.0
        self._since = time.monotonic()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Within it, what is said is said of this step, the next of those given."""
        assert name == self._names[self._done]
        self._since = time.monotonic()
        yield
        self._taken += time.monotonic() - self._since
        self._done += 1

    def say(self, what: str) -> None:
        """A line: which step of how many, the time left, and what."""
        place = f"{self._done + 1}/{len(self._names)}"
        line = f"[{place}, about {spoken(self.left())} left] {self._names[self._done]}: {what}"
        print(line, file=sys.stderr, flush=True)

    def left(self) -> float:
        """Seconds until the last step is done."""
        done, current, later = (
            sum(self._expected[: self._done]),
            self._expected[self._done],
            sum(self._expected[self._done + 1 :]),
        )
        pace = self._taken / done if done else 1.0
        elapsed = time.monotonic() - self._since
        return max(current * pace - elapsed, 1.0) + later * max(pace, elapsed / current)


def spoken(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
