"""Mixed precision against the best uniform scheme of equal size, on the shipped models.

    make bench-mixed            (or: python -m benchmarks.mixed_precision [config …])

For each uniform weight format a mixed scheme is found that is no larger; both are then measured on
the selection split, which took no part in finding it.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from audit.store import Store
from flows.config import read_plan
from flows.matrix import schemes
from halfstep.apply import applied
from halfstep.resources import reference_bytes, weight_bytes
from halfstep.scheme import Scheme
from halfstep.treatments import Treatments
from tasks.calibrate import run_calibration
from tasks.load import Loaded, load
from tasks.mixed import Search
from tasks.plan import Budget, Mixed

CONFIGS = ("digits", "fashion-mnist", "diabetes", "small-lm")
MATRIX = {
    "weights": {"format": ["int8", "int6", "int4", "int3", "int2"], "granularity": "per_channel",
                "calibrator": "mse"},
    "activations": {"format": "int8"},
}  # fmt: skip
COMPARED = ("int6", "int4", "int3")


def main(names: list[str]) -> None:
    print("| model | size | uniform | its distance | mixed | its distance | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        path = Path(__file__).parent.parent / "configs" / f"{name}.yaml"
        _compare(name, path)


def _compare(name: str, path: Path) -> None:
    uniform = schemes(MATRIX)[0]
    weights = tuple(scheme.weights for scheme in uniform)
    mixed = Mixed(weights, (uniform[0].activations,), (), (), 128)
    plan = replace(read_plan(path), schemes=uniform, mixed=mixed, sensitivity=None)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        loaded = load(plan, store)
        calibrated = run_calibration(loaded, {}, store.sweep("0" * 12, True), lambda rows: None)
        treatments = calibrated.treatments
        search = Search.of(loaded, treatments, mixed)
        whole = reference_bytes(loaded.model)
        for scheme in uniform:
            assert scheme.weights is not None
            if scheme.weights.format.name not in COMPARED:
                continue
            size = weight_bytes(loaded.model, loaded.sites, scheme)
            found = search.find(Budget("weight_bytes", size / whole)).scheme
            own = weight_bytes(loaded.model, loaded.sites, found)
            assert own <= size
            theirs, ours = (_measured(loaded, treatments, s) for s in (scheme, found))
            metric, before, after = theirs[0], theirs[1], ours[1]
            row = [
                name,
                f"{size:,}",
                f"{scheme.weights.format.name}: {theirs[2]}",
                f"{metric} {before:.4g}",
                f"{own:,}: {ours[2]}",
                f"{metric} {after:.4g}",
                f"{after / before:.2f}",
            ]
            print(f"| {' | '.join(row)} |", flush=True)


def _measured(loaded: Loaded, treatments: Treatments, scheme: Scheme) -> tuple[str, float, str]:
    """The closeness metric on selection, its value, and the headline metric as a text."""
    task = loaded.plan.tasks[0]
    evaluator, examples = task.evaluator, loaded.split(task.name, "selection")
    batch = loaded.plan.compute.batch_size
    reference = evaluator.run(loaded.model, examples, batch)
    with applied(loaded.model, treatments.for_scheme(scheme)) as model:
        outcomes = evaluator.run(model, examples, batch, reference=reference)
    found = evaluator.measure(outcomes, reference)
    return (
        evaluator.closeness,
        found[evaluator.closeness],
        f"{evaluator.headline} {found[evaluator.headline]:.4f}",
    )


if __name__ == "__main__":
    main(sys.argv[1:] or list(CONFIGS))
