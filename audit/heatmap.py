"""The matrix as a heat map: weights down, activations across, one cell a scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DARKEST = 0.6
"""Of full blue: black text stays readable on it (contrast 7 to 1 and more)."""


def heat_map(result: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """Rows and columns of labels, and for each cell its value, verdict and shade.

    The shade runs with the logarithm of the distance to the reference, from 0 (the closest) to 1.
    """
    own = [c for c in result["cells"] if c["task"] == task["name"]]
    distances = [c["distance"] for c in own if c["distance"]]
    low, high = (math.log(f(distances)) for f in (min, max)) if distances else (0.0, 0.0)
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    columns: dict[str, None] = {}
    for cell in own:
        row, column = _labels(cell)
        columns[column] = None
        shade = None
        if cell["distance"] is not None:
            at = math.log(cell["distance"]) if cell["distance"] else low
            shade = (at - low) / (high - low) if high > low else 0.0
        cells.setdefault(row, {})[column] = {
            "name": cell["name"],
            "value": cell["metrics"].get(task["headline"]),
            "verdict": cell["verdict"],
            "failed": cell["status"] != "finished",
            "chosen": cell["name"] == result["decision"]["cell"],
            "colour": _colour(shade),
        }
    return {"columns": list(columns), "rows": [{"label": r, "cells": c} for r, c in cells.items()]}


def _labels(cell: Mapping[str, Any]) -> tuple[str, str]:
    """What is done to the weights, and to the activations."""
    scheme = cell["scheme"]
    if "mixed" in cell["name"].split(" ")[:1]:
        return cell["name"], "site by site"
    weights, activations = (
        " ".join(spec.values()) if spec else "full precision"
        for spec in (scheme["weights"], scheme["activations"])
    )
    if "sums" in scheme:
        activations += f" · sums {' '.join(scheme['sums'].values())}"
    corrections = " + ".join(_named(c) for c in scheme.get("corrections", []))
    row = [weights, corrections, scheme.get("backend", "")]
    return " · ".join(filter(None, row)), activations


def _named(correction: object) -> str:
    if isinstance(correction, Mapping):
        return str(correction.get("name", correction))
    return str(correction)


def _colour(shade: float | None) -> str:
    """From white to blue, as CSS."""
    if shade is None:
        return "#ffffff"
    red, green = (round(255 * (1 - DARKEST * shade * part)) for part in (1.0, 0.6))
    return f"rgb({red},{green},255)"
