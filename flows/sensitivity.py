"""`halfstep sensitivity`: one scheme, site by site, recorded as a run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from audit.issuer import NOBODY, Issuer
from audit.note import sensitivity_note
from audit.recorder import Recorder
from audit.store import Store
from flows.entering import enter_analysis
from flows.opening import datasets
from flows.progress import reporter
from halfstep.errors import UserError, allowed
from halfstep.scheme import Scheme
from tasks.calibrate import run_calibration
from tasks.load import load
from tasks.plan import Plan
from tasks.reference import measure_reference
from tasks.sensitivity import run_sensitivity

if TYPE_CHECKING:
    from audit.trail import Trail


def sensitivity(
    plan: Plan, store: Store, cell: str, examples: int, issuer: Issuer = NOBODY
) -> dict[str, Any]:
    """Analyses the cell of that name, or the first of the matrix; returns what was found.

    Raises:
        UserError: there is no such cell; config, model, data or store are at fault.
    """
    scheme = _chosen(plan, cell)
    store.check_writable()
    reporter().say("loading data and subject")
    loaded = load(plan, store)
    with store.writing(f"sensitivity of {plan.name!r}"):
        folder = store.sweep(
            loaded.key(kind="sensitivity of", scheme=scheme.to_json(), examples=examples), False
        )
        reporter().say("reference")
        references = {
            task.name: measure_reference(loaded, task.name, "selection", folder, reporter().advance)
            for task in plan.tasks
        }
        reporter().say("calibrating")
        calibrated = run_calibration(loaded, references, folder, reporter().advance)
        reporter().say(f"sensitivity of {scheme.name}")
        record, place = run_sensitivity(loaded, calibrated.treatments, scheme, examples, folder)
        recorder = Recorder(store, plan.name, folder.sweep_id, issuer)
        try:
            recorder.sweep(record, place, datasets(loaded))

            def end(trail: Trail, run_id: str, run_ids: Mapping[str, str]) -> None:
                note = sensitivity_note(record.detail)
                evidence = trail.end(run_id, {}, note, record.ended, True)
                enter_analysis(trail, plan.name, run_id, evidence, record.detail, issuer)

            recorder.call(end)
            recorder.wait()
        finally:
            recorder.close()
    return {
        "name": plan.name,
        "run_id": recorder.run_ids[record.key],
        "experiment_id": recorder.experiment_id,
        "subject_digest": loaded.subject.digest,
        "protocol_digest": loaded.protocol_digest,
        **record.detail,
    }


def _chosen(plan: Plan, cell: str) -> Scheme:
    """The cell of that name, or the only one whose name holds it."""
    names = [scheme.name for scheme in plan.schemes]
    found = [cell] if cell in names else [name for name in names if cell in name]
    if not cell:
        found = names[:1]
    if not found:
        raise UserError(f"--cell: no cell of the matrix is called {cell!r}; {allowed(cell, names)}")
    if len(found) > 1:
        raise UserError(f"--cell: {cell!r} is part of {len(found)} names: {', '.join(found[:6])} …")
    return plan.schemes[names.index(found[0])]
