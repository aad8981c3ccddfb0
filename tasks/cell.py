"""Cell: one scheme, applied, certified, evaluated and recorded."""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path

from audit import encode, spool
from audit.environment import private
from audit.spool import Record
from audit.store import SweepFolder
from backends import backend
from evaluators.stopping import EXAMPLE
from halfstep import integer
from halfstep.accumulators import overflowing
from halfstep.resources import bits_per_weight
from halfstep.resources import resources as counted
from halfstep.scheme import Scheme
from halfstep.treatments import Treatments, qparams_tensors
from tasks.deployed import artefact, running
from tasks.early import run_watched, watch
from tasks.evaluated import Evaluated, Progress, described, finite, reuse
from tasks.ledger import (
    certificate_row,
    certificate_summary,
    correction_rows,
    coverage_rows,
    coverage_summary,
)
from tasks.load import Loaded
from tasks.stopwatch import Stopwatch


def identity(loaded: Loaded, scheme: Scheme, task: str, split: str) -> tuple[str, str]:
    """The kind and the key of a cell's record."""
    kind = "cell" if split == "selection" else "confirmation"
    watched = kind == "cell" and not scheme.deployed and loaded.plan.stops_early(loaded.task(task))
    # A backend's kernels change with its version, as ours do with our code.
    version = {"backend": backend(scheme.backend).version()} if scheme.deployed else {}
    return kind, loaded.key(
        task,
        kind="cell",
        split=split,
        scheme=scheme.to_json(),
        # When a cell stops depends on how many cells its verdict is corrected for.
        weighed_against=loaded.plan.cells if watched else None,
        **version,
    )


def run_cell(
    loaded: Loaded,
    treatments: Treatments,
    scheme: Scheme,
    task: str,
    split: str,
    reference: Evaluated,
    sweep: SweepFolder,
    progress: Progress,
) -> Evaluated:
    """One scheme on one split of one task. A cell that raises is recorded as failed; it stops no
    other."""
    kind, key = identity(loaded, scheme, task, split)
    folder = sweep.place(kind, key)
    found = reuse(sweep, kind, key)
    if found:
        return found
    timer = Stopwatch()
    base = Record(
        kind=kind,
        key=key,
        name=loaded.plan.label(scheme.name, task) + (" · confirmation" if kind != "cell" else ""),
        tags={"split": split, "task": task},
        params={"task": task, **_params(scheme)},
        started=timer.started,
    )
    try:
        return _evaluate_cell(
            loaded, treatments, scheme, task, split, reference, folder, base, timer, progress
        )
    except OSError:
        raise
    except Exception as error:  # whatever broke this cell is its record, not the sweep's end
        reason = private(f"{type(error).__name__}: {error}")
        detail = {"scheme": scheme.to_json(), "error": reason, "resources": {}}
        failed = replace(base, status="failed", detail=detail)
        record = spool.commit(
            folder, failed, {"error.txt": private(traceback.format_exc()).encode()}
        )
        return Evaluated(record, folder, None, {}, reused=False)


def _evaluate_cell(
    loaded: Loaded,
    treatments: Treatments,
    scheme: Scheme,
    task: str,
    split: str,
    reference: Evaluated,
    folder: Path,
    base: Record,
    timer: Stopwatch,
    progress: Progress,
) -> Evaluated:
    rules, examples = loaded.task(task), loaded.split(task, split)
    assert reference.outcomes is not None
    treated = treatments.for_scheme(scheme)
    certificates = treatments.certificates(scheme)
    accumulators = treatments.accumulators(scheme)
    proofs = () if scheme.deployed else treatments.proofs(scheme)
    made = artefact(loaded, treatments, scheme) if scheme.deployed else None
    prepared = timer.elapsed
    resources = counted(loaded.model, loaded.sites, scheme)
    batch, theirs, stop = loaded.plan.compute.batch_size, reference.outcomes, None
    looked_at = base.kind == "cell" and not scheme.deployed
    watching = watch(loaded.plan, rules, resources, reference) if looked_at else None
    with running(loaded, treatments, scheme) as model:
        if watching is None:
            outcomes = rules.evaluator.run(model, examples, batch, progress, theirs)
            outcomes = described(outcomes, rules, examples)
        else:
            outcomes, stop = run_watched(model, rules, examples, batch, progress, theirs, watching)
    evaluated = timer.elapsed
    if stop is not None:
        theirs = theirs.take(outcomes[EXAMPLE])
    metrics = rules.evaluator.measure(outcomes, theirs)
    digest = encode.columns_digest(outcomes.columns)
    detail = {
        "scheme": scheme.to_json(),
        "resources": resources,
        "outcomes_digest": digest,
        "metrics": finite(metrics),
        "unscored": outcomes.unscored,
        "stopped": stop.to_json() if stop else None,
        "coverage": coverage_summary(loaded, scheme),
        "certificate": certificate_summary(certificates),
        "bits_per_weight": bits_per_weight(loaded.sites, scheme),
        "arithmetic": integer.summary(treatments.integers.kernel, proofs) if proofs else None,
        "artefact": {"digest": made.digest, "bytes": made.bytes} if made else None,
        "notes": [
            *treated.notes,
            *overflowing(accumulators),
            *integer.differing(proofs),
            *sorted({f"{c.site} {c.target}: {n}" for c in certificates for n in c.notes}),
        ],
        "seconds": {"prepare": prepared, "evaluate": evaluated - prepared},
    }
    shown = {
        **metrics,
        **{f"{name}_ratio": resources[name] / reference.resources[name] for name in resources},
        **resources,
        "bits_per_weight": detail["bits_per_weight"],
        "coverage_macs": detail["coverage"]["macs"],  # type: ignore[index]
        "coverage_parameters": detail["coverage"]["parameters"],  # type: ignore[index]
        "error_over_bound": detail["certificate"]["error_over_bound"],  # type: ignore[index]
        "clipped_share": detail["certificate"]["clipped_share"],  # type: ignore[index]
        "unscored": float(outcomes.unscored),
        "examples": float(len(outcomes)),
        "seconds": evaluated,
    }
    record = replace(base, metrics=finite(shown), detail=detail)
    seconds = timer.elapsed
    files = {
        "scheme.json": encode.json_bytes(scheme.to_json()),
        "metrics.json": encode.json_bytes(finite(metrics | resources)),
        "certificate.csv": encode.csv_bytes([certificate_row(c) for c in certificates]),
        "coverage.csv": encode.csv_bytes(coverage_rows(loaded, scheme)),
        "accumulators.csv": encode.csv_bytes([a.to_json() for a in accumulators]),
        "arithmetic.csv": encode.csv_bytes([p.to_json() for p in proofs]),
        "corrections.csv": encode.csv_bytes(correction_rows(treated)),
        "qparams.safetensors": encode.safetensors_bytes(qparams_tensors(treated)),
        f"outcomes-{split}.parquet": encode.parquet_bytes(outcomes.columns),
    }
    record = spool.commit(folder, record, {name: data for name, data in files.items() if data})
    return Evaluated(record, folder, outcomes, resources, reused=False, seconds=seconds)


def _params(scheme: Scheme) -> dict[str, str]:
    """The scheme's axes as flat params: the MLflow UI filters and sorts runs by them."""
    params = {}
    for side, spec in (("weights", scheme.weights), ("activations", scheme.activations)):
        described = spec.to_json() if spec else {"format": "fp32"}
        if scheme.label and spec is not None:
            described = dict.fromkeys(described, "mixed")
        params |= {f"{side}.{axis}": value for axis, value in described.items()}
    if scheme.sums:
        params["sums"] = str(scheme.sums)
    params["backend"] = scheme.backend
    params["corrections"] = " + ".join(map(str, scheme.corrections)) or "none"
    params["overrides"] = "; ".join(map(str, scheme.overrides)) or "none"
    return params
