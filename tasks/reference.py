"""Reference: the full-precision subject under the protocol that the cells will meet."""

from __future__ import annotations

import time

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from evaluators import EVALUATORS
from halfstep.errors import UserError
from halfstep.resources import bit_operations, reference_bytes
from tasks.evaluated import Evaluated, Progress, finite, reuse
from tasks.load import Loaded


def measure_reference(
    loaded: Loaded, split: str, sweep: SweepFolder, progress: Progress
) -> Evaluated:
    """The full-precision subject on one split; on ``selection`` twice: does it repeat itself?"""
    key = loaded.key(kind="reference", split=split)
    folder = sweep.place("reference", key)
    found = reuse(loaded, sweep, "reference", key)
    if found:
        return found
    evaluator = EVALUATORS[loaded.plan.task.evaluator]
    started = time.time()
    examples, batch = loaded.splits[split], loaded.plan.compute.batch_size
    outcomes = evaluator.run(loaded.subject.model, examples, batch, progress)
    if outcomes.unscored:
        raise UserError(
            f"the full-precision subject gives NaN or infinite outputs for {outcomes.unscored} of "
            f"{len(outcomes)} examples of {split!r}; there is nothing to compare with"
        )
    digest = encode.columns_digest(outcomes.columns())
    metrics = evaluator.measure(outcomes, outcomes)
    detail: dict[str, object] = {}
    if split == "selection":
        again = evaluator.run(loaded.subject.model, examples, batch, progress)
        same = encode.columns_digest(again.columns()) == digest
        detail["deterministic"] = same
        metrics["repeat_identical"] = float(same)
    resources = {
        "weight_bytes": reference_bytes(loaded.model),
        "bit_operations": bit_operations(loaded.places, None),
    }
    record = Record(
        kind="reference",
        key=key,
        name=f"reference · {split}",
        tags={"split": split},
        metrics=finite(metrics | resources),
        detail=detail | {"resources": resources, "outcomes_digest": digest},
        started=started,
    )
    seconds = time.time() - started
    files = {f"outcomes-{split}.parquet": encode.parquet_bytes(outcomes.columns())}
    record = spool.commit(folder, record, files)
    return Evaluated(record, folder, outcomes, resources, reused=False, seconds=seconds)
