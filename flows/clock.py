"""Where a sweep's time goes: useful work by stage, and what orchestration and recording add."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of wall time by stage. Whatever is not booked as work is overhead."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    worked: float = 0.0
    elsewhere: float = 0.0
    """Seconds of work that workers did beside each other."""
    lanes: int = 1
    """How many workers took part."""

    @contextmanager
    def work(self, stage: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.add_work(stage, time.perf_counter() - before)

    @contextmanager
    def overhead(self, stage: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self._book(stage, time.perf_counter() - before)

    def add_work(self, stage: str, seconds: float) -> None:
        self._book(stage, seconds)
        self.worked += seconds

    def add_elsewhere(self, stage: str, seconds: float) -> None:
        """Work that a worker did."""
        self._book(stage, seconds)
        self.elsewhere += seconds

    def summary(self) -> dict[str, float]:
        """Stages, the total, and the share of it that was not work: where there are several
        workers, of what they could have done in that time."""
        total = time.perf_counter() - self.started
        worked = self.worked + self.elsewhere / self.lanes
        return {
            **{name: round(seconds, 3) for name, seconds in self.stages.items()},
            "total": round(total, 3),
            "overhead_share": round(max(0.0, 1 - worked / total), 4),
        }

    def _book(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds
