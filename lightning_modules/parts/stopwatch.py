"""Tells how long a part of a run took."""

import time


class Stopwatch:
    """Seconds of wall time while it ran.

    Args:
        seconds: What it shows at first.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """What it shows now."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    def start(self) -> None:
        """Go on."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Pause; once stopped, this does nothing."""
        self._seconds, self._started = self.seconds, None
