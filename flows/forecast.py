"""The forecast behind `halfstep plan`: cells, sites, coverage and cost, with nothing written."""

from __future__ import annotations

import time
from typing import Any

import torch

from flows.conduct import calibration_passes
from flows.opening import sites_json
from halfstep.coverage import covered
from halfstep.resources import (
    bit_operations,
    bits_per_weight,
    reference_bytes,
    weight_bytes,
)
from tasks.load import prepare, read_data, set_up
from tasks.plan import Plan


def forecast(plan: Plan) -> dict[str, Any]:
    """Reads the data and builds the model's structure (untrained), and counts.

    Raises:
        UserError: whatever would stop the sweep before its first cell, save bad weights.
    """
    set_up(plan.compute)
    pools, splits = read_data(plan)
    folding, sites, places = prepare(plan, plan.subject.structure(pools), splits["calibration"])
    reference = reference_bytes(folding.model)
    sizes = {name: len(examples) for name, examples in splits.items()}
    cells = len(plan.schemes)
    passes = {
        "calibration": calibration_passes(plan.schemes) * sizes["calibration"],
        "reference": 2 * sizes["selection"] + sizes["confirmation"],
        "cells": cells * sizes["selection"],
        "confirmation": sizes["confirmation"],
    }
    batch = splits["selection"].inputs[: plan.compute.batch_size]
    per_example = _seconds(folding.model, batch) / len(batch)
    return {
        "name": plan.name,
        "subject": plan.to_json()["subject"],
        "splits": sizes,
        "criteria": [criterion.to_json() for criterion in plan.task.criteria],
        "objective": plan.objective,
        "duplicates": plan.folded_duplicates,
        "cells": [
            {
                "name": scheme.name,
                "scheme": scheme.to_json(),
                "weight_bytes": (size := weight_bytes(folding.model, sites, scheme)),
                "weight_ratio": size / reference,
                "bits_per_weight": bits_per_weight(sites, scheme),
                "bit_operations_ratio": bit_operations(sites, scheme)
                / max(bit_operations(sites, None), 1),
            }
            for scheme in plan.schemes
        ],
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
        "notes": [*folding.notes, *sites.notes],
        "examples_to_run": passes,
        "estimated_seconds": round(sum(passes.values()) * per_example, 1),
    }


def _seconds(model: torch.nn.Module, batch: torch.Tensor) -> float:
    """Best of three plain passes, after one to warm up."""
    times = []
    with torch.inference_mode():
        for _ in range(4):
            before = time.perf_counter()
            model(batch)
            times.append(time.perf_counter() - before)
    return min(times[1:])
