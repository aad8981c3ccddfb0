"""What a sweep costs over its floor, on the Fashion-MNIST subject.

    make bench            (or: python -m benchmarks.sweep_over_floor [rounds])

Floor: one FP32 pass over the calibration data and, for each of the 24 cells, one FP32 pass over the
selection data, with the same batch size and threads, on the model with its batch norms folded. The
subject as it was delivered, unfolded, is slower; the sweep over that floor is printed too.

Floor and sweep are timed alternately in one run; the ratios are medians over the rounds. Training
is done before and not timed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan
from halfstep.batches import forward
from halfstep.observe import calibrate, canonical
from tasks.load import Loaded, load

CONFIG = Path(__file__).parent.parent / "configs" / "fashion-mnist.yaml"
TASK = "fashion-mnist"


def main(rounds: int) -> None:
    plan = read_plan(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        print("training the subject once, not timed …", file=sys.stderr, flush=True)
        loaded = load(plan, store)
        calibration, sweeps, delivered, stages = [], [], [], []
        for number in range(rounds + 1):
            plain = _timed(lambda: _pass(loaded, "calibration"))
            observed = _timed(lambda: _calibrate(loaded))
            floor = plain + _timed(lambda: [_pass(loaded, "selection") for _ in plan.schemes])
            unfolded = _timed(lambda: _pass(loaded, "selection", loaded.subject.model))
            started = time.perf_counter()
            result = conduct(plan, CONFIG.read_text(), store, fresh=True)
            took = time.perf_counter() - started
            if number == 0:
                continue  # imports, a new database and cold caches are paid once a process
            calibration.append(observed / plain)
            sweeps.append(took / floor)
            delivered.append(took / (plain + len(plan.schemes) * unfolded))
            stages.append({**result["seconds"], "floor": floor, "sweep": took})
            print(f"round {number}: floor {floor:.2f} s, sweep {took:.2f} s", file=sys.stderr)
        examples = len(loaded.split(TASK, "selection"))
        print(
            f"{len(plan.schemes)} cells, {examples} selection examples, "
            f"batch {plan.compute.batch_size}, {plan.compute.threads} thread(s)"
        )
        print(f"calibration pass over a plain pass   {statistics.median(calibration):.2f}")
        print(f"whole sweep over its floor           {statistics.median(sweeps):.2f}")
        print(f"the same, over the unfolded subject  {statistics.median(delivered):.2f}")
        print("where the time goes, as multiples of the floor (medians):")
        for stage in ("load", "reference", "calibrate", "cells", "confirm", "decide", "report",
                      "record"):  # fmt: skip
            share = statistics.median(s.get(stage, 0.0) / s["floor"] for s in stages)
            print(f"  {stage:<12}{share:.3f}")


def _pass(loaded: Loaded, split: str, model: torch.nn.Module | None = None) -> None:
    inputs = loaded.split(TASK, split).inputs
    with torch.inference_mode():
        for _, batch in inputs.batches(loaded.plan.compute.batch_size):
            forward(model or loaded.model, batch)


def _calibrate(loaded: Loaded) -> None:
    inputs = loaded.calibration
    batches = (inputs.batch(rows) for rows in canonical(inputs))
    calibrate(loaded.model, loaded.sites.activations, batches, examples=len(inputs))


def _timed(act: Callable[[], object]) -> float:
    before = time.perf_counter()
    act()
    return time.perf_counter() - before


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
