"""`halfstep compare`: two cells, or two sweeps, side by side; or the reasons why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from audit import lookup
from audit.evaluations import Evaluation, Recorded, protocol_differences
from audit.store import Store
from evaluators.comparison import Side, aligned, differences
from evaluators.metric import Outcomes
from flows.config import read_evaluator
from halfstep.errors import NotComparable, UserError

CONFIDENCE = 0.95


def compare(store: Store, first: str, second: str) -> dict[str, Any]:
    """Two cells (or confirmations, or references), or two sweeps.

    Raises:
        NotComparable: their protocols differ; names every field.
        UserError: one is a cell and the other a sweep, or there is no such run.
    """
    found = [lookup.find(store, name) for name in (first, second)]
    whole = ["cells" in one for one in found]
    if whole[0] != whole[1]:
        cell, sweep = (second, first) if whole[0] else (first, second)
        raise UserError(f"compare: {cell} is a cell and {sweep} a whole sweep; name two of a kind")
    sweeps = [Recorded(store, name) for name in (first, second)]
    if whole[0]:
        return _sweeps(sweeps[0], sweeps[1])
    one, two = (sweep.evaluation(run["run_id"]) for sweep, run in zip(sweeps, found, strict=True))
    rows = _compared(one, two, all_metrics=True)
    return {
        "kind": "cells",
        "confidence": CONFIDENCE,
        "first": _named(one),
        "second": _named(two),
        "notes": _notes(one.sweep, two.sweep),
        **rows,
    }


def _sweeps(first: Recorded, second: Recorded) -> dict[str, Any]:
    faults = protocol_differences(first.protocols, second.protocols)
    if faults:
        raise _refusal(first.result["sweep_id"], second.result["sweep_id"], faults)
    cells = [
        {(c["name"], c["task"]): c for c in sweep.result["cells"]} for sweep in (first, second)
    ]
    common = [key for key in cells[0] if key in cells[1]]
    return {
        "kind": "sweeps",
        "confidence": CONFIDENCE,
        "first": _sweep(first),
        "second": _sweep(second),
        "notes": _notes(first, second),
        "references": [
            {"task": task["name"]}
            | _compared(
                first.evaluation(task["reference"]["selection"]["run_id"]),
                second.evaluation(_task(second, task["name"])["reference"]["selection"]["run_id"]),
                all_metrics=False,
            )
            for task in first.result["tasks"]
        ],
        "cells": [
            {
                "name": name,
                "task": task,
                "verdicts": [side[name, task]["verdict"] for side in cells],
                "weight_bytes": [side[name, task]["weight_bytes"] for side in cells],
                **_finished(first, second, cells, (name, task)),
            }
            for name, task in common
        ],
        "only_first": [" · ".join(key) for key in cells[0] if key not in cells[1]],
        "only_second": [" · ".join(key) for key in cells[1] if key not in cells[0]],
    }


def _finished(
    first: Recorded, second: Recorded, cells: list[dict[Any, Any]], key: tuple[str, str]
) -> dict[str, Any]:
    if any(side[key]["status"] != "finished" for side in cells):
        return {"examples": 0, "differences": [], "headline": None}
    return _compared(
        first.evaluation(cells[0][key]["run_id"]),
        second.evaluation(cells[1][key]["run_id"]),
        all_metrics=False,
    )


def _compared(first: Evaluation, second: Evaluation, *, all_metrics: bool) -> dict[str, Any]:
    """The metrics of two evaluations under one protocol: all, or those that decide."""
    faults = protocol_differences(first.protocol, second.protocol)
    if faults:
        raise _refusal(first.name, second.name, faults)
    evaluator = read_evaluator(first.protocol["evaluator"], "evaluator").value
    sides = [
        Side(Outcomes(found.columns()), Outcomes(found.reference_columns()))
        for found in (first, second)
    ]
    one, two = aligned(*sides)
    deciding = {evaluator.headline, *(c["metric"] for c in first.protocol["criteria"])}
    metrics = {n: m for n, m in evaluator.metrics.items() if all_metrics or n in deciding}
    rows = differences(one, two, metrics, CONFIDENCE)
    return {
        "examples": len(one.outcomes),
        "headline": evaluator.headline,
        "differences": [row.to_json() for row in rows],
    }


def _refusal(first: str, second: str, faults: list[str]) -> NotComparable:
    return NotComparable(
        f"{first} and {second} are not comparable; their protocols differ in\n  "
        + "\n  ".join(faults)
    )


def _notes(first: Recorded, second: Recorded) -> list[str]:
    """What is not of the protocol and differs all the same."""
    notes = []
    if first.subject["digest"] != second.subject["digest"]:
        notes.append("the subjects differ: two versions of a model")
    faults = protocol_differences(first.subject["implementation"], second.subject["implementation"])
    return notes + [f"not run by the same code or on the same kind of machine: {f}" for f in faults]


def _task(sweep: Recorded, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(t for t in sweep.result["tasks"] if t["name"] == name)
    return found


def _named(found: Evaluation) -> dict[str, Any]:
    return {
        "name": found.name,
        "run_id": found.run.info.run_id,
        "sweep_id": found.sweep.result["sweep_id"],
        "task": found.task,
        "split": found.split,
    }


def _sweep(found: Recorded) -> dict[str, Any]:
    decision = found.result["decision"]
    return {
        "sweep_id": found.result["sweep_id"],
        "run_id": found.run_id,
        "subject_digest": found.result["subject_digest"],
        "verdict": decision["verdict"],
        "cell": decision["cell"],
    }
