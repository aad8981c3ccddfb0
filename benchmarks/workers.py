"""What a second worker buys, and what a thousand would wait for.

    make bench-workers         (or: python -m benchmarks.workers [rounds])

The same long cells (Fashion-MNIST, 12,000 selection images) are done by one process of `halfstep
work` and by two, alternating in one run, from the queue of a depot in a folder; both are started
and warm before the clock. Timed is from the first cell offered to the last one done. Then, from
what was measured here, a simulation of 1 to 1,000 workers: each cell takes its worker the measured
seconds (or a minute), the one conductor and the one recorder their measured parts, and the depot
the bytes that each worker reads once.
"""

from __future__ import annotations

import heapq
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan
from flows.crew import Team
from tasks.depot import Depot
from tasks.queue import publish
from tasks.work import CellWork, Done, Work

CONFIG = Path("configs/fashion-mnist.yaml")
DEPOT_BYTES_A_SECOND = 1.25e9
"""Ten gigabits: what one bucket or file server is taken to give."""


PUTS_A_SECOND, PUTS_A_CELL = 3500, 14
"""What S3 says it takes of one prefix; what a cell writes: files, record, claim, queue."""
RECORDED: list[float] = []
"""Seconds that MLflow took for each run."""


class Timed:
    """Submits pieces through the queue; notes when cells begin and end, and what the conductor's
    own part of each takes."""

    def __init__(self, depot: Depot) -> None:
        self.depot, self.numbers = depot, iter(range(10**6))
        self.first, self.last, self.done = 0.0, 0.0, []  # type: float, float, list[Done]
        self.offering = 0.0

    def __call__(self, work: Work):  # type: ignore[no-untyped-def]
        before = time.perf_counter()
        wait = publish(self.depot, next(self.numbers), work)
        counted = isinstance(work, CellWork) and work.split == "selection"
        if counted:
            self.first = self.first or before
            self.offering += time.perf_counter() - before

        def waiting() -> Done:
            done = wait(lambda text: None)
            if counted:
                self.last = time.perf_counter()
                self.done.append(done)
            return done

        return waiting


def _timing_mlflow() -> None:
    from audit.trail import Trail

    real = Trail.run

    def run(self: Trail, *arguments: Any) -> str:
        before = time.perf_counter()
        found = real(self, *arguments)
        RECORDED.append(time.perf_counter() - before)
        return found

    Trail.run = run  # type: ignore[method-assign]


def main(rounds: int = 2) -> None:
    _timing_mlflow()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers in (1, 2):
            timed, size, collecting, recording = _run(workers)
            seconds[workers].append(timed.last - timed.first)
    cells = len(timed.done)
    each = statistics.median(done.seconds for done in timed.done)
    print(f"{cells} cells of {each:.2f} s each (median), two cores")
    one, two = (statistics.median(seconds[n]) for n in (1, 2))
    print(f"one worker {one:.1f} s, two workers {two:.1f} s: speed-up {one / two:.2f}")
    offering = timed.offering / cells
    print(f"the conductor offers a cell in {offering * 1e3:.1f} ms and collects it in "
          f"{collecting * 1e3:.1f} ms; a worker reads {size / 2**20:.1f} MiB once")  # fmt: skip
    print("simulated, 100 cells a worker, as long as here, and of a minute:")
    for workers in (1, 2, 10, 100, 1000):
        row = [_simulated(workers, 100 * workers, t, offering, collecting, recording, size)
               for t in (each, 60.0)]  # fmt: skip
        print(f"  {workers:>5} workers: speed-up {row[0]:7.1f}   {row[1]:7.1f}")
    serial = {"recording in MLflow": recording, "the conductor": offering + collecting}
    for name, taken in serial.items():
        print(f"{name} takes {taken * 1e3:.1f} ms a cell: full at {each / taken:.0f} workers with "
              f"such cells, {60 / taken:.0f} with cells of a minute")  # fmt: skip
    print(f"reading the kit takes 1,000 workers {1000 * size / DEPOT_BYTES_A_SECOND:.0f} s at ten "
          f"gigabits; an object store that takes {PUTS_A_SECOND} writes a second, {PUTS_A_CELL} of "
          f"them a cell, is full at {each * PUTS_A_SECOND / PUTS_A_CELL:.0f} and "
          f"{60 * PUTS_A_SECOND / PUTS_A_CELL:.0f}")  # fmt: skip


def _run(workers: int) -> tuple[Timed, int, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        place, config = Path(folder, "depot"), Path(folder, "fashion.yaml")
        config.write_text(_long_cells())
        depot = Depot(str(place))
        depot.check()
        served = [
            subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "work", str(place)],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for _ in range(workers)
        ]  # fmt: skip
        try:
            timed = Timed(depot)
            team = Team(depot, timed, workers)
            store = Store(Path(folder, "mlruns"))
            shared = Path(tempfile.gettempdir(), "halfstep-bench-cache")
            shared.mkdir(exist_ok=True)
            store.path.mkdir()
            os.symlink(shared, store.path / "cache")  # trained once for all rounds
            conduct(read_plan(config), config.read_text(), store, crew=team)
            read: dict[str, int] = {}
            for _, done in team.done:
                read[done.worker] = read.get(done.worker, 0) + done.bytes_read
            cells = [work.key for work, _ in team.done if isinstance(work, CellWork)]
            before = time.perf_counter()
            for key in cells:
                depot.fetch_record(key, Path(folder, "collected", key))
            collecting = (time.perf_counter() - before) / len(cells)
            return timed, max(read.values()), collecting, statistics.median(RECORDED)
        finally:
            for one in served:
                one.terminate()
                one.wait()


def _long_cells() -> str:
    config = yaml.safe_load(CONFIG.read_text())
    config["tasks"][0]["data"]["validation"] = 12000
    config["matrix"] = {
        "weights": {"format": ["int8", "int6", "int4"], "granularity": ["per_channel"]},
        "activations": {"format": "int8", "calibrator": ["minmax", "mse"]},
    }
    return yaml.safe_dump(config)


def _simulated(
    workers: int,
    cells: int,
    each: float,
    offering: float,
    collecting: float,
    recording: float,
    size: int,
) -> float:
    """Speed-up over the cells alone: events of one conductor, its recorder and its workers."""
    ready = workers * size / DEPOT_BYTES_A_SECOND  # all read the kit through one pipe
    free = [ready] * workers
    heapq.heapify(free)
    conductor, ends = 0.0, []
    for _ in range(cells):  # offered in order, as fast as one process can
        conductor += offering
        start = max(heapq.heappop(free), conductor)
        heapq.heappush(free, start + each)
        ends.append(start + each)
    collected, recorded = conductor, 0.0
    for end in sorted(ends):
        collected = max(collected, end) + collecting
        recorded = max(recorded, collected) + recording
    return cells * each / recorded


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
