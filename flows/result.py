"""The result of a sweep: the one JSON document that `--json`, `show` and the report read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audit.spool import Record
from audit.store import SweepFolder
from evaluators import EVALUATORS
from halfstep.scheme import Scheme
from tasks.decide import Decision
from tasks.evaluated import Evaluated
from tasks.load import Loaded

NOT_CALIBRATED = {"key": None, "representativeness": None, "unsettled": {}, "notes": []}
"""Where no scheme fixes an activation's range, no data was observed."""


def result_json(
    loaded: Loaded,
    decision: Decision,
    decided: Mapping[str, Any],
    references: Mapping[str, Evaluated],
    cells: Sequence[tuple[Scheme, Evaluated]],
    confirmed: Evaluated | None,
    calibration: Record | None,
    folder: SweepFolder,
) -> dict[str, Any]:
    """Everything but run ids and seconds, which are known last."""
    plan = loaded.plan
    verdicts = {cell["name"]: cell for cell in decided["cells"]}
    return {
        "sweep_id": folder.sweep_id,
        "run_id": None,
        "name": plan.name,
        "experiment": plan.name,
        "experiment_id": None,
        "evaluator": plan.task.evaluator,
        "headline": EVALUATORS[plan.task.evaluator].headline,
        "subject_digest": loaded.subject.digest,
        "protocol_digest": loaded.protocol_digest,
        "splits": {
            name: {"examples": len(examples), "sha256": examples.digest}
            for name, examples in loaded.splits.items()
        },
        "criteria": decided["criteria"],
        "overrides": [str(override) for override in plan.overrides],
        "skipped": list(plan.skip),
        "reference": {
            split: {
                "key": done.record.key,
                "run_id": None,
                "metrics": done.record.metrics,
                "outcomes_digest": done.record.detail["outcomes_digest"],
            }
            for split, done in references.items()
        },
        "deterministic": references["selection"].record.detail["deterministic"],
        "nondeterministic_operators": references["selection"].record.detail[
            "nondeterministic_operators"
        ],
        "calibration": {
            **(calibration.detail | {"key": calibration.key} if calibration else NOT_CALIBRATED),
            "run_id": None,
        },
        "batch_norm": {
            "folded": len(loaded.folding.folded),
            "max_relative_difference": loaded.folding.max_relative_difference,
            "notes": list(loaded.folding.notes),
        },
        "cells": [cell_json(scheme, done, verdicts[scheme.name]) for scheme, done in cells],
        "confirmation": cell_json(decision.chosen, confirmed, decided["confirmation"])
        if decision.chosen and confirmed
        else None,
        "decision": {
            key: decided[key]
            for key in ("verdict", "cell", "summary", "criteria", "limits", "digest")
        },
        "seconds": {},
    }


def cell_json(scheme: Scheme, done: Evaluated, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """One cell with its verdict."""
    detail = done.record.detail
    return {
        "name": scheme.name,
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
        "notes": detail.get("notes", []),
        "reused_from": done.record.tags.get("reused_from"),
    }
