"""Opening a sweep: the parent's record holds everything known before the first cell runs."""

from __future__ import annotations

import json
import time
from typing import Any

from audit import encode, spool
from audit.environment import private
from audit.recorder import Recorder
from audit.spool import Record
from audit.store import SweepFolder
from evaluators.criterion import Criterion
from halfstep.examples import Examples
from halfstep.sites import Sites
from tasks.ledger import coverage_rows
from tasks.load import Loaded


def open_sweep(
    loaded: Loaded,
    config_text: str,
    environ: dict[str, Any],
    folder: SweepFolder,
    recorder: Recorder,
) -> Record:
    """Commits the parent's record, or finds the one that an interrupted sweep left."""
    place = folder.place("sweep", loaded.sweep_key)
    record = spool.recall(place)
    if record is None:
        record = spool.commit(place, _record(loaded, folder), _files(loaded, config_text, environ))
    recorder.sweep(record, place, datasets(loaded))
    return record


def _record(loaded: Loaded, folder: SweepFolder) -> Record:
    plan = loaded.plan
    return Record(
        kind="sweep",
        key=loaded.sweep_key,
        name=f"{plan.name} · {folder.sweep_id}",
        tags={
            "subject_digest": loaded.subject.digest,
            "protocol_digest": loaded.protocol_digest,
            **{f"{name}_sha256": e.digest for name, e in _splits(loaded).items()},
        },
        params={
            "evaluator": ", ".join(dict.fromkeys(task.evaluated_by.name for task in plan.tasks)),
            "tasks": ", ".join(task.name for task in plan.tasks),
            "objective": plan.objective,
            "cells": str(plan.cells),
            "evaluation": plan.evaluation,
            "threads": str(plan.compute.threads),
            "batch_size": str(plan.compute.batch_size),
            **{
                "criterion." + plan.key(_param(c), task.name): f"{c.limit} {c.margin:g}"
                + ("" if c.counted else f" at {c.confidence:.0%}")
                for task in plan.tasks
                for c in task.criteria
            },
        },
        started=time.time(),
    )


def _files(loaded: Loaded, config_text: str, environ: dict[str, Any]) -> dict[str, bytes]:
    files = {
        "config/config.yaml": config_text.encode(),
        "config/plan.json": encode.json_bytes(loaded.plan.to_json()),
        "config/protocol.json": encode.json_bytes(loaded.protocol),
        "environment.json": encode.json_bytes(environ),
        "subject.json": encode.json_bytes(_subject(loaded)),
        "coverage.csv": encode.csv_bytes(coverage_rows(loaded, loaded.plan.schemes[0])),
    }
    return {name: private(data.decode()).encode() for name, data in files.items()}


def _subject(loaded: Loaded) -> dict[str, Any]:
    return {
        "digest": loaded.subject.digest,
        "origin": loaded.subject.origin,
        "notes": list(loaded.subject.notes),
        "implementation": dict(loaded.implementation),
        "architecture": str(loaded.subject.model).splitlines(),
        "sites": sites_json(loaded.sites),
        "batch_norm": {
            "folded": list(loaded.folding.folded),
            "max_relative_difference": loaded.folding.max_relative_difference,
            "notes": list(loaded.folding.notes),
        },
    }


def sites_json(sites: Sites) -> dict[str, Any]:
    """Every site, what it belongs to, and what stays at full precision."""
    return {
        "weights": [
            {"name": w.name, "kind": w.kind, "parameters": list(w.parameters),
             "matrix": list(w.layout.shape)}
            for w in sites.weights
        ],
        "activations": [
            {"name": a.name, "kind": a.kind, "role": a.operand.role, "weight": a.weight}
            for a in sites.activations
        ],
        "notes": list(sites.notes),
    }  # fmt: skip


def _splits(loaded: Loaded) -> dict[str, Examples]:
    """Every split of every task, under the name of its task where there are several."""
    return {
        loaded.plan.key(name, task): examples
        for task, found in loaded.data.tasks.items()
        for name, examples in found.splits.items()
    }


def datasets(loaded: Loaded) -> list[dict[str, Any]]:
    """What MLflow shows as dataset inputs; its own digests read only the first rows."""
    return [
        {
            "name": f"{task} {split}",
            "context": split,
            "sha256": examples.digest,
            "examples": len(examples),
            "source": private(json.dumps(found.task.taken_from.to_json("source"))),
            "profile": json.dumps(
                {
                    "examples": len(examples),
                    "rows": len(examples.inputs),
                    "inputs": examples.inputs.shape,
                }
            ),
        }
        for task, found in loaded.data.tasks.items()
        for split, examples in found.splits.items()
    ]


def _param(criterion: Criterion) -> str:
    return criterion.label.replace(" ", "_")
