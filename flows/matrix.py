"""The matrix: a product of axes with include and exclude, resolved into distinct schemes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from backends import BACKENDS
from flows import parse
from halfstep.calibrators import FOR_ACTIVATIONS_ONLY, parse_calibrator
from halfstep.corrections import Awq, Correction, parse_corrections
from halfstep.errors import UserError
from halfstep.formats import FORMATS
from halfstep.granularity import PerBlock, PerGroup, parse_granularity
from halfstep.scheme import POSITIONS, SIMULATED, Override, Scheme, Spec

AXES = ("format", "granularity", "calibrator")
SIDES = ("weights", "activations")
SUMS = "sums"
"""Beside the sides, and off by default: the terms of sums of two activations."""
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
_DEFAULTS[SUMS] = _DEFAULTS["activations"]
Point = dict[str, str]
"""One combination: ``weights.format`` and so on to the chosen value."""


def schemes(value: object, overrides: tuple[Override, ...] = ()) -> tuple[tuple[Scheme, ...], int]:
    """The distinct schemes of a matrix, in order, and how many more spelled the same thing.

    ``overrides`` go into every one of them.

    Raises:
        UserError: an unknown name, an impossible or empty combination, an empty matrix.
    """
    matrix = parse.mapping(
        value, "matrix", [*_DEFAULTS, "corrections", "backend", "include", "exclude"]
    )
    named = {
        f"{side}.{axis}": values
        for side in _DEFAULTS
        for axis, values in axes(matrix.get(side, {}), side, "matrix").items()
    }
    named["corrections"] = _names(matrix.get("corrections", ["none"]), "matrix.corrections")
    for text in named["corrections"]:
        _corrections(text, "matrix.corrections")
    named["backend"] = _names(matrix.get("backend", [SIMULATED]), "matrix.backend")
    points = [dict(zip(named, combo, strict=True)) for combo in itertools.product(*named.values())]
    for i, rule in enumerate(_rules(matrix, "exclude")):
        points = _exclude(points, rule, f"matrix.exclude[{i}]", list(named))
    for i, rule in enumerate(_rules(matrix, "include")):
        points.append(_include(rule, f"matrix.include[{i}]"))
    if not points:
        raise UserError(
            "matrix: it is empty; name at least one format under weights or activations"
        )
    made = [_scheme(point, overrides) for point in points]
    distinct = dict.fromkeys(made)
    # A deployed cell is judged beside its simulation, which is a cell too.
    kept = tuple(dict.fromkeys(s for scheme in distinct for s in (scheme.simulation, scheme)))
    return kept, len(made) - len(distinct)


def axes(value: object, side: str, where: str) -> dict[str, list[str]]:
    """The names that each axis of a side lists, defaults where it lists none."""
    given = parse.mapping(value, f"{where}.{side}", AXES)
    defaults = _DEFAULTS[side]
    return {
        axis: _names(given.get(axis, defaults[axis]), f"{where}.{side}.{axis}") for axis in AXES
    }


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
    known = [f"{side}.{axis}" for side in _DEFAULTS for axis in AXES]
    given = parse.mapping(rule, where, [*known, "corrections", "backend"])
    point = {f"{s}.{a}": _DEFAULTS[s][a][0] for s in _DEFAULTS for a in AXES}
    point |= {"corrections": "none", "backend": SIMULATED}
    return point | {key: parse.typed_value(str, v, f"{where}.{key}") for key, v in given.items()}


def _scheme(point: Point, overrides: tuple[Override, ...]) -> Scheme:
    weights = spec_of(_side(point, "weights"), "weights", "matrix.weights")
    activations = spec_of(_side(point, "activations"), "activations", "matrix.activations")
    if weights is None and activations is None:
        raise UserError(
            "matrix: weights 'none' with activations 'none' quantizes nothing; exclude it with "
            "exclude: [{weights.format: none, activations.format: none}]"
        )
    sums = spec_of(_side(point, SUMS), SUMS, f"matrix.{SUMS}")
    if sums is not None and activations is None:
        raise UserError(
            f"matrix.{SUMS}: {sums.format.name} with activations 'none' quantizes sums of what "
            "stays at full precision; exclude it with exclude: "
            f"[{{{SUMS}.format: {sums.format.name}, activations.format: none}}]"
        )
    corrections = checked_corrections(
        point["corrections"], weights, activations, "matrix.corrections"
    )
    backend = parse.one_of(point["backend"], BACKENDS, "matrix.backend", "backend")
    return Scheme(weights, activations, corrections, overrides, backend=backend, sums=sums)


def _corrections(text: str, where: str) -> tuple[Correction, ...]:
    try:
        return parse_corrections(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def checked_corrections(
    text: str, weights: Spec | None, activations: Spec | None, where: str
) -> tuple[Correction, ...]:
    """The corrections that a text names.

    Raises:
        UserError: they could do nothing, or something else than they are known for.
    """
    corrections = _corrections(text, where)
    where = f"{where}: {text!r}"
    exclude = "exclude: [{{corrections: {!r}, {}: none}}]"
    if corrections and weights is None:
        way = exclude.format(text, "weights.format")
        raise UserError(f"{where} with weights 'none' has nothing to correct; use {way}")
    for correction in corrections:
        if isinstance(correction, Awq) and activations is not None:
            raise UserError(
                f"{where}: awq scales weights for full-precision inputs; with activations "
                f"{activations.format.name} use smoothquant, or exclude the pair with exclude: "
                f"[{{corrections: {text!r}, activations.format: {activations.format.name}}}]"
            )
    return corrections


def _side(point: Point, side: str) -> Point:
    return {axis: point[f"{side}.{axis}"] for axis in AXES}


def spec_of(point: Point, side: str, where: str) -> Spec | None:
    """A spec from ``format``, ``granularity`` and ``calibrator``."""
    name = point["format"]
    if name == FULL_PRECISION:
        return None
    parse.one_of(name, [*FORMATS, FULL_PRECISION], f"{where}.format", "format")
    try:
        granularity = parse_granularity(
            point["granularity"], "activations" if side == SUMS else side
        )
        parse_calibrator(point["calibrator"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    calibrator = point["calibrator"]
    kind = calibrator.split("(")[0]
    spec = Spec(FORMATS[name], granularity, calibrator)
    if spec.calibrator != calibrator:
        return spec  # it could not matter, and is not part of the scheme
    if kind == "entropy" and isinstance(granularity, PerGroup | PerBlock):
        raise UserError(
            f"{where}: entropy needs a histogram and a group of {granularity} is too "
            "small for one; use mse, or exclude the pair with exclude: "
            f"[{{{side}.granularity: {granularity}, {side}.calibrator: {calibrator}}}]"
        )
    if kind in FOR_ACTIVATIONS_ONLY and side == "weights":
        raise UserError(f"{where}: {calibrator} averages over batches, and a weight has none")
    return spec


def read_overrides(value: object) -> tuple[Override, ...]:
    """The list under ``sites.overrides``."""
    if not isinstance(value, list):
        raise UserError(f"sites.overrides: expected a list, got {value!r}")
    return tuple(_override(rule, f"sites.overrides[{i}]") for i, rule in enumerate(value))


def _override(value: object, where: str) -> Override:
    rule = parse.mapping(value, where, ["names", "kinds", "positions", *SIDES])
    names, kinds, positions = (
        tuple(_names(rule[key], f"{where}.{key}")) if key in rule else ()
        for key in ("names", "kinds", "positions")
    )
    for position in positions:
        parse.one_of(position, POSITIONS, f"{where}.positions", "position")
    if not (names or kinds or positions):
        raise UserError(f"{where}: name the sites by names, kinds or positions")
    if not any(side in rule for side in SIDES):
        raise UserError(f"{where}: it changes nothing; give weights, activations or both")
    changed = {
        side: _side_override(rule[side], side, f"{where}.{side}") for side in SIDES if side in rule
    }
    return Override(names, kinds, positions, **changed)


def _side_override(value: object, side: str, where: str) -> Spec | None:
    if value == FULL_PRECISION:
        return None
    given = parse.mapping(value, where, AXES)
    parse.required(given, "format", where)
    point = {axis: given.get(axis, _DEFAULTS[side][axis][0]) for axis in AXES}
    return spec_of(
        {axis: parse.typed_value(str, v, f"{where}.{axis}") for axis, v in point.items()},
        side,
        where,
    )
