"""Closing a sweep: the decision's record, the report, every run's verdict, and the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit import encode, environment, spool
from audit.decision import decision_markdown, schema_bytes
from audit.deployment import deployment_note
from audit.note import calibration_note, cell_note, mixed_note, sensitivity_note, sweep_note
from audit.recorder import Recorder
from audit.spool import Record
from audit.store import SweepFolder
from flows.clock import Clock
from flows.entering import NOT_REVIEWED, enter_decision
from flows.result import result_json
from halfstep.scheme import Scheme
from tasks.decide import Decision, Evaluations, distance
from tasks.decision_record import decision_json
from tasks.evaluated import Evaluated
from tasks.load import Loaded

if TYPE_CHECKING:
    from audit.trail import Trail

Cells = Sequence[tuple[Scheme, Evaluations]]
STAGE_NOTES = {
    "mixed": mixed_note,
    "sensitivity": sensitivity_note,
    "deployment": deployment_note,
}


def close(
    loaded: Loaded,
    decision: Decision,
    references: Mapping[str, Evaluations],
    calibration: Record | None,
    extra: Sequence[Record],
    cells: Cells,
    confirmed: Evaluations,
    variant: tuple[Record, Path] | None,
    parent: Record,
    folder: SweepFolder,
    recorder: Recorder,
    clock: Clock,
    weights_from: Mapping[str, int],
) -> dict[str, Any]:
    """Commits the decision, closes every run, enters the ledger, and leaves the result where a
    rerun finds it."""
    decided = decision_json(loaded, decision, cells, confirmed, references["selection"])
    result = result_json(
        loaded, decision, decided, references, cells, confirmed, calibration, extra, folder
    )
    result["weights_from"] = dict(weights_from)
    result["issued"] = _issued(loaded, recorder)
    environ = json.loads(
        (folder.place("sweep", parent.key) / spool.FILES / "environment.json").read_bytes()
    )
    result["environment"] = environment.summary(environ)
    record_of = decided | {"issued": result["issued"]}
    with clock.overhead("report"):
        files = _files(loaded, decision, record_of, result, cells, environ)
    with clock.overhead("record"):
        record, place = _commit(loaded, decided, result, files, folder)
        # An interrupted sweep may have issued it before.
        kept = json.loads((place / spool.FILES / "decision.json").read_bytes())
        result["issued"] = kept["issued"]
        recorder.wait()
        result["experiment_id"] = recorder.experiment_id
        _fill_run_ids(result, recorder.run_ids, parent.key)
        entered = recorder.entered
        if entered is None:
            recorder.call(
                lambda trail, parent_id, run_ids: _close_runs(
                    trail, parent_id, run_ids, result, calibration, record, place
                )
            )
            recorder.wait()
    result["cells_reused"] = sum(done.reused for _, by_task in cells for done in by_task.values())
    result["seconds"] = clock.summary() | {
        "training": round(loaded.training_seconds, 3),
        "recorder_cpu": round(recorder.cpu_seconds, 3),
    }
    if entered is None:
        data = encode.json_bytes(result)

        def enter(trail: Trail, parent_id: str, run_ids: Mapping[str, str]) -> None:
            trail.attach(parent_id, "sweep.json", data)
            sums = any("sums" in cell["scheme"] for cell in result["cells"])
            headlines = [task["headline"] for task in result["tasks"]]
            trail.offer_view(headlines, ["sums"] if sums else [])
            evidence = _close_parent(trail, parent_id, result, record)
            enter_decision(trail, parent_id, evidence, result, variant)

        recorder.call(enter)
        recorder.wait()
    else:  # killed after the last entry and before the result was left here
        data = recorder.stored("sweep.json")
        result = json.loads(data) | {"cells_reused": result["cells_reused"]}
    spool.keep(folder.result, data)
    return result | {"reused": False}


def _files(
    loaded: Loaded,
    decision: Decision,
    decided: Mapping[str, Any],
    result: dict[str, Any],
    cells: Cells,
    environ: Mapping[str, Any],
) -> dict[str, bytes]:
    """The decision's artifacts."""
    from audit.report import plots, report_html, table

    scheme, shown = shown_cell(loaded, decision, cells)
    certificates = table(shown.folder, "certificate.csv")
    figures = plots(result, certificates, scheme.name)
    page = report_html(
        result,
        loaded.plan.to_json(),
        environ,
        figures,
        scheme.name,
        certificates,
        table(shown.folder, "coverage.csv"),
    )
    return {
        "decision.json": encode.json_bytes(decided),
        "decision.md": decision_markdown(decided, result).encode(),
        "decision.schema.json": schema_bytes(),
        "report.html": page.encode(),
        "cells.csv": encode.csv_bytes(_rows(result)),
        **{f"plots/{name}.png": data for name, data in figures.items()},
    }


def _issued(loaded: Loaded, recorder: Recorder) -> dict[str, Any]:
    """When and where a decision was recorded; not part of its digest."""
    now = datetime.now(UTC).replace(microsecond=0)
    until = now + timedelta(days=loaded.plan.expires_after_days)
    return {
        "at": now.isoformat(),
        "expires": until.date().isoformat(),
        "author": recorder.issuer.name,
        "supersedes": recorder.previous,
    }


def shown_cell(loaded: Loaded, decision: Decision, cells: Cells) -> tuple[Scheme, Evaluated]:
    """The cell that the report shows site by site: the chosen one, else the closest."""
    task = loaded.plan.tasks[0]
    if decision.chosen is not None:
        scheme, done = next(cell for cell in cells if cell[0] == decision.chosen)
        return scheme, done[task.name]
    scheme, done = min(cells, key=lambda cell: distance(task, cell[1][task.name]))
    return scheme, done[task.name]


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    headlines = {task["name"]: task["headline"] for task in result["tasks"]}
    return [
        {
            "cell": cell["name"],
            "task": cell["task"],
            "verdict": cell["verdict"],
            "status": cell["status"],
            "metric": headlines[cell["task"]],
            "value": cell["metrics"].get(headlines[cell["task"]]),
            "weight_bytes": cell["weight_bytes"],
            "bit_operations": cell["resources"].get("bit_operations"),
            "dominated": cell["dominated"],
            "backend": cell["backend"],
            "latency_p50_ms": cell["measured"].get("latency_p50_ms", {}).get("value"),
            "examples": cell["stopped"]["examples"] if cell["stopped"] else None,
            "reasons": "; ".join(cell["reasons"]),
        }
        for cell in result["cells"]
    ]


def _commit(
    loaded: Loaded,
    decided: Mapping[str, Any],
    result: Mapping[str, Any],
    files: Mapping[str, bytes],
    folder: SweepFolder,
) -> tuple[Record, Path]:
    key = loaded.key(kind="decision", digest=decided["digest"], sweep=folder.sweep_id)
    place = folder.place("decision", key)
    record = spool.recall(place)
    if record is None:
        verdicts = [scheme["verdict"] for scheme in result["schemes"]]
        metrics = {
            **{
                f"cells_{v}": float(verdicts.count(v)) for v in ("accept", "reject", "inconclusive")
            },
            "cells_failed": float(sum(c["status"] == "failed" for c in result["cells"])),
            **{
                "reference_" + loaded.plan.key(task["headline"], task["name"]): task["reference"][
                    "selection"
                ]["metrics"][task["headline"]]
                for task in result["tasks"]
            },
        }
        record = spool.commit(place, Record("decision", key, "decision", metrics=metrics), files)
    return record, place


def _evaluations(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells, and the confirmation where there was one."""
    return [*result["cells"], *result["confirmation"]]


def _references(result: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(split, reference) of every task."""
    return [found for task in result["tasks"] for found in task["reference"].items()]


def _fill_run_ids(result: dict[str, Any], run_ids: Mapping[str, str], parent_key: str) -> None:
    result["run_id"] = run_ids[parent_key]
    for cell in _evaluations(result):
        cell["run_id"] = run_ids[cell["key"]]
    for _, reference in _references(result):
        reference["run_id"] = run_ids[reference["key"]]
    calibration = result["calibration"]
    calibration["run_id"] = run_ids.get(calibration["key"])
    for stage in result["stages"].values():
        stage["run_id"] = run_ids[stage["key"]]


def _close_runs(
    trail: Trail,
    parent_id: str,
    run_ids: Mapping[str, str],
    result: Mapping[str, Any],
    calibration: Record | None,
    record: Record,
    place: Path,
) -> None:
    """Verdicts and notes on every run but the parent, which gets the decision's record."""
    for cell in _evaluations(result):
        finished = cell["status"] == "finished"
        tags = {"verdict": cell["verdict"], "status": cell["status"]}
        own = _measured(cell)
        trail.end(run_ids[cell["key"]], tags, cell_note(cell), record.ended, finished, own)
    for split, reference in _references(result):
        note = f"Full precision on the {split} split."
        own = _measured(reference)
        trail.end(run_ids[reference["key"]], {}, note, record.ended, True, own)
    if calibration is not None:
        note = calibration_note(result["calibration"])
        trail.end(run_ids[calibration.key], {}, note, record.ended, True)
    for kind, stage in result["stages"].items():
        trail.end(run_ids[stage["key"]], {}, STAGE_NOTES[kind](stage), record.ended, True)
    trail.add(parent_id, record, place)


def _measured(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """What was timed, as metrics of the evaluation's run: to sort and to plot by. The bounds are
    in the record of the deployment."""
    return {name: found["value"] for name, found in evaluation["measured"].items()}


def _close_parent(trail: Trail, parent_id: str, result: Mapping[str, Any], record: Record) -> str:
    """Closes the sweep's own run; returns the digest of its evidence."""
    decision = result["decision"]
    tags = {
        "verdict": decision["verdict"],
        "cell": decision["cell"] or "none",
        "expires": result["issued"]["expires"],
        "author": result["issued"]["author"],
        "signed_off": NOT_REVIEWED,
        "decision_digest": decision["digest"],
    }
    return trail.end(parent_id, tags, sweep_note(result), record.ended, True)
