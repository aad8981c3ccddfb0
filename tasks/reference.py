"""Reference: the full-precision subject under the protocol that the cells will meet."""

from __future__ import annotations

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from halfstep.determinism import nondeterministic_operators
from halfstep.errors import UserError
from halfstep.observe import check_finite, observing
from halfstep.resources import resources as counted
from tasks.calibrate import SELECTION, calibrated_sites, flat
from tasks.evaluated import Evaluated, Progress, described, finite, reuse
from tasks.load import Loaded
from tasks.stopwatch import Stopwatch


def identity(loaded: Loaded, task: str, split: str) -> str:
    """The key of a reference's record."""
    return loaded.key(task, kind="reference", split=split)


def measure_reference(
    loaded: Loaded, task: str, split: str, sweep: SweepFolder, progress: Progress
) -> Evaluated:
    """The full-precision subject on one split; on ``selection`` twice: does it repeat itself?

    The second time what enters the calibrated sites is sketched, to be compared with calibration.
    Observing changes no output, so the repetition proves that too.
    """
    key = identity(loaded, task, split)
    folder = sweep.place("reference", key)
    found = reuse(sweep, "reference", key)
    if found:
        return found
    rules = loaded.task(task)
    evaluator, model = rules.evaluator, loaded.subject.model
    timer = Stopwatch()
    examples, batch = loaded.split(task, split), loaded.plan.compute.batch_size
    outcomes = evaluator.run(model, examples, batch, progress)
    if outcomes.unscored > rules.max_unscored * len(outcomes):
        raise UserError(
            f"the full-precision subject gives NaN or infinite outputs for {outcomes.unscored} of "
            f"{len(outcomes)} examples of {split!r}; there is nothing to compare with"
        )
    outcomes = described(outcomes, rules, examples)
    digest = encode.columns_digest(outcomes.columns)
    metrics = evaluator.measure(outcomes, outcomes)
    detail: dict[str, object] = {}
    files: dict[str, bytes] = {}
    if split == "selection":
        with observing(model, calibrated_sites(loaded)) as observer:
            again = evaluator.run(model, examples, batch, progress)
        same = encode.columns_digest(described(again, rules, examples).columns) == digest
        operators = nondeterministic_operators(model, examples.inputs.sample(batch))
        detail |= {"deterministic": same, "nondeterministic_operators": list(operators)}
        metrics["repeat_identical"] = float(same)
        seen = {name: tally.observation() for name, tally in observer.tallies.items()}
        for name, observation in seen.items():
            check_finite(name, observation.sketch, "the selection data")
        files[SELECTION] = encode.safetensors_bytes(
            flat({name: observation.tensors() for name, observation in seen.items()})
        )
    resources = counted(loaded.model, loaded.sites, None)
    record = Record(
        kind="reference",
        key=key,
        name=loaded.plan.label(f"reference · {split}", task),
        tags={"split": split, "task": task},
        metrics=finite(metrics | resources),
        detail=detail | {"resources": resources, "outcomes_digest": digest},
        started=timer.started,
    )
    seconds = timer.elapsed
    files[f"outcomes-{split}.parquet"] = encode.parquet_bytes(outcomes.columns)
    record = spool.commit(folder, record, files)
    return Evaluated(record, folder, outcomes, resources, reused=False, seconds=seconds)
