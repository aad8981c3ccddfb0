"""The forecast behind `halfstep plan`: cells, sites, coverage and cost, with nothing written."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audit.registry import fetch
from audit.store import Store
from evaluators.acceptance import ruled_out
from evaluators.power import Outlook, outlook, smallest_part
from evaluators.stopping import EARLY_SHARE
from flows.conduct import passes_of
from flows.opening import sites_json
from halfstep.batches import Batch, forward, size
from halfstep.coverage import covered
from halfstep.examples import Examples
from halfstep.resources import bits_per_weight, resources
from halfstep.scheme import Scheme
from sources import Context
from tasks.data import read_data
from tasks.load import prepare, set_up
from tasks.plan import Plan, Task


def forecast(plan: Plan, store: Store) -> dict[str, Any]:
    """Reads the data and builds the model's structure (untrained), and counts.

    Raises:
        UserError: whatever would stop the sweep before its first cell, save bad weights.
    """
    set_up(plan.compute)
    with tempfile.TemporaryDirectory() as folder:
        context = Context(Path(folder), lambda address: fetch(store, address))
        data = read_data(plan, context)
        model = plan.subject.structure(data.pools, context)
        folding, sites, places = prepare(plan, model, data.calibration)
        passes = passes_of(plan, data)
        batches = [
            found.splits["selection"].inputs.sample(plan.compute.batch_size)
            for found in data.tasks.values()
        ]
        base = resources(folding.model, sites, None)
        counted = {scheme: resources(folding.model, sites, scheme) for scheme in plan.schemes}
        family = {"selection": _family(plan, counted, base), "confirmation": len(plan.tasks)}
        outlooks = {
            task.name: [
                {"split": split, **found.to_json()}
                for split, cells in family.items()
                for found in _outlooks(
                    task,
                    data.tasks[task.name].splits[split],
                    # Early looks leave the test on all examples less of the error level.
                    cells / (1 - EARLY_SHARE)
                    if split == "selection" and plan.stops_early(task)
                    else cells,
                )
            ]
            for task in plan.tasks
        }
    per_row = sum(_seconds(folding.model, b) for b in batches) / sum(map(size, batches))
    return {
        "name": plan.name,
        "subject": plan.to_json()["subject"],
        "calibration_rows": len(data.calibration),
        "tasks": [
            {
                "name": task.name,
                "evaluator": task.evaluated_by.name,
                "splits": {n: len(e) for n, e in data.tasks[task.name].splits.items()},
                "criteria": [criterion.to_json() for criterion in task.criteria],
                "outlook": outlooks[task.name],
            }
            for task in plan.tasks
        ],
        "objective": plan.objective,
        "duplicates": plan.folded_duplicates,
        "cells": [
            {
                "name": scheme.name,
                "scheme": scheme.to_json(),
                "weight_bytes": cost["weight_bytes"],
                "weight_ratio": cost["weight_bytes"] / base["weight_bytes"],
                "bits_per_weight": bits_per_weight(sites, scheme),
                "bit_operations_ratio": cost["bit_operations"] / max(base["bit_operations"], 1),
            }
            for scheme, cost in counted.items()
        ],
        "mixed": [budget.label for budget in plan.mixed.budgets] if plan.mixed else [],
        "evaluation": plan.evaluation,
        "sensitivity": plan.sensitivity,
        "deployment": plan.deployment.to_json() if plan.deployment else None,
        "overrides": [str(override) for override in plan.overrides],
        "skipped": list(plan.skip),
        "sites": sites_json(sites),
        "coverage": [
            {
                "place": row.place.name,
                "kind": row.place.kind,
                "parameters": row.place.parameters,
                "macs": row.place.macs,
                "weights": row.weights,
                "activations": row.activations,
                "quantized": row.quantized,
                "reason": row.reason,
            }
            for row in covered(places, plan.schemes[0], sites, plan.skip)
        ],
        "notes": [*data.notes, *folding.notes, *sites.notes],
        "examples_to_run": passes,
        "estimated_seconds": round(sum(passes.values()) * per_row, 1),
    }


def _family(
    plan: Plan, counted: Mapping[Scheme, Mapping[str, float]], base: Mapping[str, float]
) -> int:
    """How many verdicts are corrected for together: those that no counted criterion rules out."""
    left = sum(
        not ruled_out(cost, base, task.criteria) for cost in counted.values() for task in plan.tasks
    )
    found = len(plan.mixed.budgets) * len(plan.tasks) if plan.mixed else 0
    return max(left + found, 1)


def _outlooks(task: Task, examples: Examples, cells: float) -> list[Outlook]:
    """What each tested criterion can decide on one split."""
    clusters = task.cluster and len(np.unique(examples.columns[task.cluster].astype(str)))
    targets = examples.targets.all().numpy() if not examples.targets.shape else None
    found = []
    for rule in task.criteria:
        if rule.counted:
            continue
        metric = task.evaluator.metrics[rule.metric]
        smallest = None if clusters else smallest_part(rule, metric, examples.columns, targets)
        count = clusters or len(examples)
        found.append(
            outlook(rule, metric, count, cells, smallest=smallest, clustered=bool(clusters))
        )
    return found


def _seconds(model: torch.nn.Module, batch: Batch) -> float:
    """Best of three plain passes, after one to warm up."""
    times = []
    with torch.inference_mode():
        for _ in range(4):
            before = time.perf_counter()
            forward(model, batch)
            times.append(time.perf_counter() - before)
    return min(times[1:])
