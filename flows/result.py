"""The result of a sweep: the one JSON document that `--json`, `show` and the report read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audit.spool import Record
from audit.store import SweepFolder
from halfstep.scheme import Scheme
from tasks.decide import Decision, Evaluations, distance, dominated, objective
from tasks.evaluated import Evaluated, finite
from tasks.load import Loaded

NOT_CALIBRATED = {"key": None, "representativeness": None, "unsettled": {}, "notes": []}
"""Where no scheme fixes an activation's range, no data was observed."""


def result_json(
    loaded: Loaded,
    decision: Decision,
    decided: Mapping[str, Any],
    references: Mapping[str, Evaluations],
    cells: Sequence[tuple[Scheme, Evaluations]],
    confirmed: Evaluations,
    calibration: Record | None,
    extra: Sequence[Record],
    folder: SweepFolder,
) -> dict[str, Any]:
    """Everything but run ids and seconds, which are known last."""
    plan = loaded.plan
    tasks = [_task_json(loaded, task.name, references) for task in plan.tasks]
    verdicts = {(cell["name"], cell["task"]): cell for cell in decided["cells"]}
    behind = _dominated(loaded, cells)
    details = [done.record.detail for done in references["selection"].values()]
    return {
        "sweep_id": folder.sweep_id,
        "run_id": None,
        "name": plan.name,
        "experiment": plan.name,
        "experiment_id": None,
        "subject_digest": loaded.subject.digest,
        "protocol_digest": loaded.protocol_digest,
        "notes": loaded.notes,
        "tasks": tasks,
        "reference": tasks[0]["reference"],
        "overrides": [str(override) for override in plan.overrides],
        "skipped": list(plan.skip),
        "deterministic": all(detail["deterministic"] for detail in details),
        "nondeterministic_operators": sorted(
            {name for detail in details for name in detail["nondeterministic_operators"]}
        ),
        "calibration": {
            **(calibration.detail | {"key": calibration.key} if calibration else NOT_CALIBRATED),
            "rows": len(loaded.calibration),
            "run_id": None,
        },
        "batch_norm": {
            "folded": len(loaded.folding.folded),
            "max_relative_difference": loaded.folding.max_relative_difference,
            "notes": list(loaded.folding.notes),
        },
        "reused_from": _origins(references, cells, confirmed, calibration, extra),
        "schemes": [
            {
                "name": scheme.name,
                "verdict": decision.overall(scheme.name),
                "tasks": {t: j[scheme.name].verdict for t, j in decision.selection.items()},
            }
            for scheme, _ in cells
        ],
        "stages": {
            record.kind: {"key": record.key, "run_id": None, **record.detail} for record in extra
        },
        "cells": [
            cell_json(scheme, task, done, verdicts[scheme.name, task])
            | {
                "distance": finite({"": distance(loaded.task(task), done)}).get(""),
                "dominated": behind[scheme.name, task],
            }
            for scheme, by_task in cells
            for task, done in by_task.items()
        ],
        "confirmation": [
            cell_json(decision.chosen, found["task"], confirmed[found["task"]], found)
            for found in decided["confirmation"]
            if decision.chosen is not None
        ],
        "decision": {
            key: decided[key]
            for key in (
                "verdict",
                "cell",
                "summary",
                "tasks",
                "margins_left",
                "alternatives",
                "assumptions",
                "limits",
                "bought",
                "target",
                "expires_after_days",
                "digest",
            )
        }
        | {"criteria": [c for task in decided["tasks"] for c in task["criteria"]]},
        "seconds": {},
    }


def _origins(
    references: Mapping[str, Evaluations],
    cells: Sequence[tuple[Scheme, Evaluations]],
    confirmed: Evaluations,
    calibration: Record | None,
    extra: Sequence[Record],
) -> dict[str, str]:
    """The sweep that each piece was taken from, by the piece's key."""
    evaluated = [*references.values(), *(by_task for _, by_task in cells), confirmed]
    records = [done.record for by_task in evaluated for done in by_task.values()]
    records += [*extra, *([calibration] if calibration else [])]
    return {r.key: r.tags["reused_from"] for r in records if "reused_from" in r.tags}


def _dominated(
    loaded: Loaded, cells: Sequence[tuple[Scheme, Evaluations]]
) -> dict[tuple[str, str], bool]:
    """For each cell whether another of its task is as small and as close to the reference."""
    found = {}
    for task in loaded.plan.tasks:
        own = [(scheme.name, by_task[task.name]) for scheme, by_task in cells]
        points = [(objective(loaded.plan, done), distance(task, done)) for _, done in own]
        for (name, _), behind in zip(own, dominated(points), strict=True):
            found[name, task.name] = behind
    return found


def _task_json(loaded: Loaded, name: str, references: Mapping[str, Evaluations]) -> dict[str, Any]:
    """A task with what the reference came to on it."""
    task = loaded.task(name)
    return {
        "name": name,
        "evaluator": task.evaluated_by.name,
        "headline": task.evaluator.headline,
        "closeness": task.evaluator.closeness,
        "higher_is_better": task.evaluator.metrics[task.evaluator.headline].higher_is_better,
        "protocol_digest": loaded.task_protocols[name],
        "splits": {
            split: {"examples": len(examples), "sha256": examples.digest}
            for split, examples in loaded.data.tasks[name].splits.items()
        },
        "cluster": task.cluster,
        "criteria": [criterion.to_json() for criterion in task.criteria],
        "reference": {split: _reference_json(done[name]) for split, done in references.items()},
    }


def _reference_json(done: Evaluated) -> dict[str, Any]:
    return {
        "key": done.record.key,
        "run_id": None,
        "metrics": done.record.metrics,
        "outcomes_digest": done.record.detail["outcomes_digest"],
        "measured": {name: found.to_json() for name, found in done.measured.items()},
    }


def cell_json(
    scheme: Scheme, task: str, done: Evaluated, verdict: Mapping[str, Any]
) -> dict[str, Any]:
    """One cell with its verdict."""
    detail = done.record.detail
    return {
        "name": scheme.name,
        "task": task,
        "key": done.record.key,
        "run_id": None,
        "scheme": scheme.to_json(),
        "status": done.record.status,
        "verdict": verdict["verdict"],
        "reasons": verdict["reasons"],
        "findings": verdict["findings"],
        "metrics": detail.get("metrics", {}),
        "weight_bytes": done.resources.get("weight_bytes"),
        "resources": dict(done.resources),
        "outcomes_digest": detail.get("outcomes_digest"),
        "bits_per_weight": detail.get("bits_per_weight"),
        "coverage": detail.get("coverage"),
        "certificate": detail.get("certificate"),
        "unscored": detail.get("unscored"),
        "stopped": detail.get("stopped"),
        "notes": detail.get("notes", []),
        "backend": scheme.backend,
        "measured": {name: found.to_json() for name, found in done.measured.items()},
        "arithmetic": detail.get("arithmetic"),
        "artefact": detail.get("artefact"),
        "reused_from": done.record.tags.get("reused_from"),
    }
