"""The matrix: a product of axes with include and exclude, resolved into distinct schemes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from flows import parse
from halfstep.calibrators import parse_calibrator
from halfstep.errors import UserError
from halfstep.formats import FORMATS
from halfstep.granularity import (
    FOR_ACTIVATIONS,
    FOR_WEIGHTS,
    GRANULARITIES,
    PerGroup,
    parse_granularity,
)
from halfstep.scheme import Scheme, Spec

AXES = ("format", "granularity", "calibrator")
SIDES = ("weights", "activations")
FULL_PRECISION = "none"
_DEFAULTS = {
    "weights": {
        "format": [FULL_PRECISION],
        "granularity": ["per_channel"],
        "calibrator": ["minmax"],
    },
    "activations": {
        "format": [FULL_PRECISION],
        "granularity": ["per_tensor"],
        "calibrator": ["minmax"],
    },
}
Point = dict[str, str]
"""One combination: ``weights.format`` and so on to the chosen value."""


def schemes(value: object) -> tuple[tuple[Scheme, ...], int]:
    """The distinct schemes of a matrix, in order, and how many more spelled the same thing.

    Raises:
        UserError: an unknown name, an impossible or empty combination, an empty matrix.
    """
    matrix = parse.mapping(value, "matrix", [*SIDES, "corrections", "include", "exclude"])
    corrections = _names(matrix.get("corrections", ["none"]), "matrix.corrections")
    for correction in corrections:
        parse.one_of(correction, ["none"], "matrix.corrections", "correction")
    axes = {
        f"{side}.{axis}": values
        for side in SIDES
        for axis, values in _axes(matrix.get(side, {}), side).items()
    }
    points = [dict(zip(axes, combo, strict=True)) for combo in itertools.product(*axes.values())]
    for i, rule in enumerate(_rules(matrix, "exclude")):
        points = _exclude(points, rule, f"matrix.exclude[{i}]", list(axes))
    for i, rule in enumerate(_rules(matrix, "include")):
        points.append(_include(rule, f"matrix.include[{i}]"))
    if not points:
        raise UserError(
            "matrix: it is empty; name at least one format under weights or activations"
        )
    made = [_scheme(point) for point in points]
    kept = tuple(dict.fromkeys(made))
    return kept, len(made) - len(kept)


def _axes(value: object, side: str) -> dict[str, list[str]]:
    given = parse.mapping(value, f"matrix.{side}", AXES)
    defaults = _DEFAULTS[side]
    return {axis: _names(given.get(axis, defaults[axis]), f"matrix.{side}.{axis}") for axis in AXES}


def _names(value: object, where: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {value!r} is not allowed: a name or a list of names")
    if not names:
        raise UserError(f"{where}: the list is empty, so the matrix would be")
    return names


def _rules(matrix: Mapping[str, Any], key: str) -> list[object]:
    rules = matrix.get(key, [])
    if not isinstance(rules, list):
        raise UserError(f"matrix.{key}: expected a list, got {rules!r}")
    return rules


def _exclude(points: list[Point], rule: object, where: str, axes: list[str]) -> list[Point]:
    wanted = parse.mapping(rule, where, axes)
    kept = [p for p in points if any(p[axis] != value for axis, value in wanted.items())]
    if len(kept) == len(points):
        raise UserError(f"{where}: {dict(wanted)} excludes nothing; is it spelled as in the axes?")
    return kept


def _include(rule: object, where: str) -> Point:
    given = parse.mapping(rule, where, [f"{side}.{axis}" for side in SIDES for axis in AXES])
    point = {f"{s}.{a}": _DEFAULTS[s][a][0] for s in SIDES for a in AXES}
    return point | {key: parse.typed_value(str, v, f"{where}.{key}") for key, v in given.items()}


def _scheme(point: Point) -> Scheme:
    weights = _spec(point, "weights", FOR_WEIGHTS)
    activations = _spec(point, "activations", FOR_ACTIVATIONS)
    if weights is None and activations is None:
        raise UserError(
            "matrix: weights 'none' with activations 'none' quantizes nothing; exclude it with "
            "exclude: [{weights.format: none, activations.format: none}]"
        )
    return Scheme(weights, activations)


def _spec(point: Point, side: str, granularities: tuple[str, ...]) -> Spec | None:
    name = point[f"{side}.format"]
    where = f"matrix.{side}"
    if name == FULL_PRECISION:
        return None
    parse.one_of(name, [*FORMATS, FULL_PRECISION], f"{where}.format", "format")
    granularity = parse_granularity(point[f"{side}.granularity"])
    kind = next(k for k, v in GRANULARITIES.items() if isinstance(granularity, v))
    parse.one_of(kind, granularities, f"{where}.granularity", f"granularity for {side}")
    calibrator = point[f"{side}.calibrator"]
    parse_calibrator(calibrator)
    if calibrator == "entropy" and isinstance(granularity, PerGroup):
        raise UserError(
            f"{where}: entropy needs a histogram and a group of {granularity.size} values is too "
            "small for one; use mse, or exclude the pair with exclude: "
            f"[{{{side}.granularity: {granularity}, {side}.calibrator: entropy}}]"
        )
    return Spec(FORMATS[name], granularity, calibrator)
