"""When a piece of work began, and how long it has taken."""

from __future__ import annotations

import time


class Stopwatch:
    """``started`` is in seconds since the epoch; durations are by a clock that nobody sets."""

    def __init__(self) -> None:
        self.started = time.time()
        self._began = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._began
