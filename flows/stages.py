"""The stages of a sweep beside its matrix: what a config says of mixed precision, sensitivity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from evaluators.criterion import COUNTED
from flows import parse
from flows.matrix import AXES, axes, checked_corrections, spec_of
from halfstep.errors import UserError
from halfstep.scheme import Override, Spec
from tasks.plan import Budget, Mixed, Named

FEWEST_EXAMPLES = 8
PROBED = 128


def read_sensitivity(value: object) -> int | None:
    """Examples to probe on; None where the stage is not asked for."""
    if value is None:
        return None
    given = parse.mapping(value, "sensitivity", ["examples"])
    return parse.whole(given.get("examples", PROBED), "sensitivity.examples", FEWEST_EXAMPLES)


def read_mixed(value: object, evaluator: Named, overrides: tuple[Override, ...]) -> Mixed | None:
    """The choices and budgets of mixed precision; None where it is not asked for."""
    if value is None:
        return None
    where = "mixed_precision"
    keys = ["weights", "activations", "corrections", "budgets", "examples"]
    given = parse.mapping(value, where, keys)
    sides = {
        side: _choices(given.get(side, {}), side, where) for side in ("weights", "activations")
    }
    if len(sides["weights"]) * len(sides["activations"]) < 2:
        raise UserError(f"{where}: there is nothing to choose from; list several formats")
    if not any(sides["weights"]) and not any(sides["activations"]):
        raise UserError(f"{where}: every choice is 'none'")
    corrections = parse.typed_value(str, given.get("corrections", "none"), f"{where}.corrections")
    first = next(filter(None, sides["activations"]), None)
    made = checked_corrections(
        corrections, next(filter(None, sides["weights"]), None), first, f"{where}.corrections"
    )
    budgets = parse.required(given, "budgets", where)
    if not isinstance(budgets, list) or not budgets:
        raise UserError(f"{where}.budgets: a list of at least one budget is needed")
    return Mixed(
        weights=sides["weights"],
        activations=sides["activations"],
        corrections=made,
        budgets=_budgets(budgets, f"{where}.budgets", evaluator),
        examples=parse.whole(given.get("examples", PROBED), f"{where}.examples", FEWEST_EXAMPLES),
        overrides=overrides,
    )


def _choices(value: object, side: str, where: str) -> tuple[Spec | None, ...]:
    named = axes(value, side, where)
    points = [dict(zip(AXES, combo, strict=True)) for combo in product(*named.values())]
    return tuple(dict.fromkeys(spec_of(point, side, f"{where}.{side}") for point in points))


def _budgets(value: Sequence[object], where: str, evaluator: Named) -> tuple[Budget, ...]:
    headline = evaluator.value.headline
    found = []
    for i, item in enumerate(value):
        budget = parse.mapping(item, f"{where}[{i}]", [*COUNTED, headline])
        if len(budget) != 1:
            raise UserError(f"{where}[{i}]: one of {', '.join([*COUNTED, headline])} is needed")
        name, limit = next(iter(budget.items()))
        top = 1.0 if name in COUNTED else 1e9
        found.append(Budget(name, parse.number(limit, f"{where}[{i}].{name}", 0.0, top)))
        if found[-1] in found[:-1]:
            raise UserError(f"{where}[{i}]: {name} {limit} stands twice")
    return tuple(found)
