"""Evaluate: the reference, the one calibration pass, and the cells."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from evaluators import EVALUATORS
from evaluators.metric import Outcomes
from halfstep.apply import applied
from halfstep.certificate import Certificate
from halfstep.observe import calibrate
from halfstep.resources import bit_operations, reference_bytes, weight_bytes
from halfstep.scheme import Scheme
from halfstep.sketch import Sketch
from halfstep.treatments import Treatments, qparams_tensors
from tasks.load import Loaded

Progress = Callable[[int], None]
"""Told how many examples each batch adds."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A cell or the reference on one split, and the record that was committed for it."""

    record: Record
    folder: Path
    outcomes: Outcomes | None
    """None where the cell failed."""
    resources: Mapping[str, float]
    reused: bool
    seconds: float = 0.0
    """Of useful work: forward passes and what they need, without the writing of the record."""


def measure_reference(
    loaded: Loaded, split: str, sweep: SweepFolder, progress: Progress
) -> Evaluated:
    """The full-precision subject on one split; on ``selection`` twice: does it repeat itself?"""
    key = loaded.key(kind="reference", split=split)
    folder = sweep.place("reference", key)
    found = _reuse(loaded, sweep, "reference", key)
    if found:
        return found
    evaluator = EVALUATORS[loaded.plan.task.evaluator]
    started = time.time()
    examples, batch = loaded.splits[split], loaded.plan.compute.batch_size
    outcomes = evaluator.run(loaded.subject.model, examples, batch, progress)
    metrics = evaluator.measure(outcomes, outcomes)
    detail: dict[str, object] = {}
    if split == "selection":
        again = evaluator.run(loaded.subject.model, examples, batch, progress)
        same = encode.columns_digest(again.columns()) == encode.columns_digest(outcomes.columns())
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
        metrics=_finite(metrics | resources),
        detail=detail
        | {"resources": resources, "outcomes_digest": encode.columns_digest(outcomes.columns())},
        started=started,
    )
    seconds = time.time() - started
    files = {f"outcomes-{split}.parquet": encode.parquet_bytes(outcomes.columns())}
    record = spool.commit(folder, record, files)
    return Evaluated(record, folder, outcomes, resources, reused=False, seconds=seconds)


def run_calibration(loaded: Loaded, sweep: SweepFolder, progress: Progress) -> Treatments:
    """The one instrumented pass; its sketches are recorded, and read back on a resumed sweep."""
    examples = loaded.splits["calibration"].inputs
    key = loaded.key(kind="calibration")
    folder = sweep.place("calibration", key)
    if any(scheme.needs_sketches for scheme in loaded.plan.schemes):
        sketches = _read_sketches(folder, key)
        if sketches is None:
            sketches = _observe(loaded, folder, key, progress)
    else:
        sketches = {}
    probe = loaded.splits["selection"].inputs
    return Treatments(loaded.model, loaded.sites, sketches, probe if len(probe) else examples)


def _observe(loaded: Loaded, folder: Path, key: str, progress: Progress) -> dict[str, Sketch]:
    started = time.time()

    def batches():  # type: ignore[no-untyped-def]
        for batch in loaded.splits["calibration"].inputs.split(loaded.plan.compute.batch_size):
            yield batch
            progress(len(batch))

    sketches = calibrate(loaded.model, loaded.sites, batches())
    tensors = {
        f"{name}.{part}": tensor
        for name, sketch in sketches.items()
        for part, tensor in sketch.tensors().items()
    }
    spool.discard_damaged(folder)
    record = Record("calibration", key, "calibration", started=started)
    spool.commit(folder, record, {"sketches.safetensors": encode.safetensors_bytes(tensors)})
    return sketches


def _read_sketches(folder: Path, key: str) -> dict[str, Sketch] | None:
    record = spool.read(folder)
    if record is None or record.key != key:
        return None
    from safetensors.torch import load_file

    tensors = load_file(folder / spool.FILES / "sketches.safetensors")
    names = [name.removesuffix(".range") for name in tensors if name.endswith(".range")]
    return {
        name: Sketch.from_tensors({p: tensors[f"{name}.{p}"] for p in ("bins", "counts", "range")})
        for name in names
    }


def run_cell(
    loaded: Loaded,
    treatments: Treatments,
    scheme: Scheme,
    split: str,
    reference: Evaluated,
    sweep: SweepFolder,
    progress: Progress,
) -> Evaluated:
    """One scheme on one split. A cell that raises is recorded as failed; it stops no other."""
    key = cell_key(loaded, scheme, split)
    kind = "cell" if split == "selection" else "confirmation"
    folder = sweep.place(kind, key)
    found = _reuse(loaded, sweep, kind, key)
    if found:
        return found
    started = time.time()
    base = Record(
        kind=kind,
        key=key,
        name=scheme.name if kind == "cell" else f"{scheme.name} · confirmation",
        tags={"split": split},
        params=scheme_params(scheme),
        started=started,
    )
    try:
        return _evaluate_cell(loaded, treatments, scheme, split, reference, folder, base, progress)
    except (KeyboardInterrupt, SystemExit, OSError):
        raise
    except Exception as error:  # whatever broke this cell is its record, not the sweep's end
        reason = f"{type(error).__name__}: {error}"
        detail = {"scheme": scheme.to_json(), "error": reason, "resources": {}}
        failed = replace(base, status="failed", detail=detail)
        record = spool.commit(folder, failed, {"error.txt": traceback.format_exc().encode()})
        return Evaluated(record, folder, None, {}, reused=False)


def _evaluate_cell(
    loaded: Loaded,
    treatments: Treatments,
    scheme: Scheme,
    split: str,
    reference: Evaluated,
    folder: Path,
    base: Record,
    progress: Progress,
) -> Evaluated:
    evaluator = EVALUATORS[loaded.plan.task.evaluator]
    treated = treatments.for_scheme(scheme)
    certificates = treatments.certificates(scheme)
    prepared = time.time()
    with applied(loaded.model, treated) as model:
        outcomes = evaluator.run(
            model, loaded.splits[split], loaded.plan.compute.batch_size, progress
        )
    evaluated = time.time()
    assert reference.outcomes is not None
    metrics = evaluator.measure(outcomes, reference.outcomes)
    resources = {
        "weight_bytes": weight_bytes(loaded.model, loaded.sites, scheme),
        "bit_operations": bit_operations(loaded.places, scheme),
    }
    digest = encode.columns_digest(outcomes.columns())
    detail = {
        "scheme": scheme.to_json(),
        "resources": resources,
        "outcomes_digest": digest,
        "metrics": _finite(metrics),
        "unscored": outcomes.unscored,
        "coverage": coverage_summary(loaded, scheme),
        "certificate": certificate_summary(certificates),
        "notes": sorted({f"{c.site} {c.target}: {n}" for c in certificates for n in c.notes}),
        "seconds": {"prepare": prepared - base.started, "evaluate": evaluated - prepared},
    }
    shown = {
        **metrics,
        **{f"{name}_ratio": resources[name] / reference.resources[name] for name in resources},
        **resources,
        "coverage_macs": detail["coverage"]["macs"],  # type: ignore[index]
        "coverage_parameters": detail["coverage"]["parameters"],  # type: ignore[index]
        "error_over_bound": detail["certificate"]["error_over_bound"],  # type: ignore[index]
        "clipped_share": detail["certificate"]["clipped_share"],  # type: ignore[index]
        "unscored": float(outcomes.unscored),
        "seconds": evaluated - base.started,
    }
    record = replace(base, metrics=_finite(shown), detail=detail)
    seconds = time.time() - base.started
    files = {
        "scheme.json": encode.json_bytes(scheme.to_json()),
        "metrics.json": encode.json_bytes(_finite(metrics | resources)),
        "certificate.csv": encode.csv_bytes([certificate_row(c) for c in certificates]),
        "coverage.csv": encode.csv_bytes(coverage_rows(loaded, scheme)),
        "qparams.safetensors": encode.safetensors_bytes(qparams_tensors(treated)),
        f"outcomes-{split}.parquet": encode.parquet_bytes(outcomes.columns()),
    }
    record = spool.commit(folder, record, files)
    return Evaluated(record, folder, outcomes, resources, reused=False, seconds=seconds)


def cell_key(loaded: Loaded, scheme: Scheme, split: str) -> str:
    return loaded.key(kind="cell", split=split, scheme=scheme.to_json())


def scheme_params(scheme: Scheme) -> dict[str, str]:
    """The scheme's axes as flat params: the MLflow UI filters and sorts runs by them."""
    params = {}
    for side, spec in (("weights", scheme.weights), ("activations", scheme.activations)):
        described = spec.to_json() if spec else {"format": "fp32"}
        params |= {f"{side}.{axis}": value for axis, value in described.items()}
    return params


def certificate_row(certificate: Certificate) -> dict[str, object]:
    row = certificate.to_json()
    return {**row, "notes": "; ".join(certificate.notes)}


def certificate_summary(certificates: tuple[Certificate, ...]) -> dict[str, object]:
    """Over all sites: does every bound hold, how close did it get, how much was clipped."""
    elements = sum(c.elements for c in certificates)
    return {
        "holds": all(c.holds for c in certificates),
        "sites": len(certificates),
        "elements": elements,
        "error_over_bound": max(c.error_over_bound for c in certificates),
        "clipped_share": sum(c.clipped for c in certificates) / elements,
        "worst_sqnr_db": min(
            (c.sqnr_db for c in certificates if c.sqnr_db is not None), default=None
        ),
    }


def coverage_rows(loaded: Loaded, scheme: Scheme) -> list[dict[str, object]]:
    """The ledger of places under one scheme, with their shares."""
    parameters = sum(p.parameters for p in loaded.places) or 1
    macs = sum(p.macs for p in loaded.places) or 1
    return [
        {
            "place": p.name,
            "kind": p.kind,
            "weights": str(scheme.weights or "fp32") if p.quantized else "fp32",
            "activations": str(scheme.activations or "fp32") if p.quantized else "fp32",
            "parameters": p.parameters,
            "parameter_share": p.parameters / parameters,
            "macs": p.macs,
            "mac_share": p.macs / macs,
            "quantized": p.quantized,
            "reason": p.reason,
        }
        for p in loaded.places
    ]


def coverage_summary(loaded: Loaded, scheme: Scheme) -> dict[str, float]:
    """Shares of parameters stored, and of multiply-accumulates run, at low precision."""
    parameters = sum(p.parameters for p in loaded.places) or 1
    macs = sum(p.macs for p in loaded.places) or 1
    covered = sum(site.weight(loaded.model).numel() for site in loaded.sites)
    return {
        "parameters": covered / parameters if scheme.weights else 0.0,
        "macs": sum(p.macs for p in loaded.places if p.quantized) / macs,
    }


def _reuse(loaded: Loaded, sweep: SweepFolder, kind: str, key: str) -> Evaluated | None:
    """Work that is recorded already: in this sweep, or in an earlier one with equal digests."""
    folder, earlier = sweep.place(kind, key), sweep.earlier(kind, key)
    record = spool.read(folder)
    if record is None:
        spool.discard_damaged(folder)
        record = spool.copy(earlier, folder) if earlier else None
    if record is None or record.key != key:
        return None
    outcomes = None
    if record.status == "finished":
        data = (folder / spool.FILES / f"outcomes-{record.tags['split']}.parquet").read_bytes()
        outcomes = EVALUATORS[loaded.plan.task.evaluator].read(encode.read_parquet(data))
    return Evaluated(record, folder, outcomes, record.detail["resources"], reused=True)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """Only what is a number: a metric that could not be computed is absent, not infinite."""
    return {k: float(v) for k, v in values.items() if np.isfinite(v)}
