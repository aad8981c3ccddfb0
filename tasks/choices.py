"""The choices that mixed precision has at each site, and what they cost of a resource."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from halfstep.errors import UserError
from halfstep.operators import SUM
from halfstep.parts import ACTIVATION, WEIGHT
from halfstep.resources import bit_operations, factor, reference_bytes, resources
from halfstep.scheme import Override, Scheme, Spec
from halfstep.sites import Sites
from halfstep.weights import packed_bytes
from tasks.allocate import ROUNDING, Costs
from tasks.plan import Mixed

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Unit:
    """Sites that take one choice together: a weight, or the activations of one operation."""

    side: str
    names: tuple[str, ...]
    choices: tuple[Spec | None, ...]
    """None: full precision."""


def units(sites: Sites, mixed: Mixed) -> list[Unit]:
    """Every weight, and every activation that enters a product, with the choices that overrides
    leave to each; sums stay at full precision."""
    found = []
    for weight in sites.weights:
        specs = [s.weight_spec(weight, sites) for s in mixed.uniform if s.weights is not None]
        found.append(Unit(WEIGHT, (weight.name,), _distinct(specs, mixed.weights)))
    together = {
        name: operation.activations
        for operation in sites.operations
        for name in operation.activations
    }
    seen: set[str] = set()
    for active in sites.activations:
        if active.name not in seen and active.kind != SUM:
            names = together[active.name]
            seen |= set(names)
            specs = [
                s.activation_spec(active, sites) for s in mixed.uniform if s.activations is not None
            ]
            found.append(Unit(ACTIVATION, names, _distinct(specs, mixed.activations)))
    return found


def _distinct(
    resolved: Sequence[Spec | None], asked: Sequence[Spec | None]
) -> tuple[Spec | None, ...]:
    extra = [None] if None in asked else []
    return tuple(dict.fromkeys([*resolved, *extra])) or (None,)


def scheme_of(
    found: Sequence[Unit], chosen: Sequence[int], mixed: Mixed, sites: Sites, label: str
) -> Scheme:
    """A combination as a scheme: the most frequent spec of each side, and an override for each unit
    that has another."""
    specs = [unit.choices[c] for unit, c in zip(found, chosen, strict=True)]
    base = {side: _most_frequent([s for u, s in zip(found, specs, strict=True) if u.side == side])
            for side in (WEIGHT, ACTIVATION)}  # fmt: skip

    def made(every: bool) -> Scheme:
        overrides = [
            _override(unit, spec)
            for unit, spec in zip(found, specs, strict=True)
            if every or spec != base[unit.side]
        ]
        # A pattern also names what lies below it, so longer names come later and count.
        overrides.sort(key=lambda override: len(override.names[0]))
        corrections = mixed.corrections if base[WEIGHT] else ()
        return Scheme(base[WEIGHT], base[ACTIVATION], corrections, tuple(overrides), label)

    scheme = made(every=False)
    return scheme if choices_of(found, scheme, sites) == list(chosen) else made(every=True)


def _override(unit: Unit, spec: Spec | None) -> Override:
    names = tuple(glob.escape(name) for name in unit.names)
    if unit.side == WEIGHT:
        return Override(names=names, weights=spec)
    return Override(names=names, activations=spec)


def _most_frequent(specs: Sequence[Spec | None]) -> Spec | None:
    """Of those that quantize; None where none does."""
    real = [spec for spec in specs if spec is not None]
    return max(dict.fromkeys(real), key=real.count, default=None)


def choices_of(found: Sequence[Unit], scheme: Scheme, sites: Sites) -> list[int]:
    """Which choice a scheme takes at each unit; -1 where it is none of them."""
    specs: dict[tuple[str, str], Spec | None] = {
        (WEIGHT, w.name): scheme.weight_spec(w, sites) for w in sites.weights
    }
    specs |= {(ACTIVATION, a.name): scheme.activation_spec(a, sites) for a in sites.activations}
    return [
        unit.choices.index(spec)
        if (spec := specs[unit.side, unit.names[0]]) in unit.choices
        else -1
        for unit in found
    ]


def resource_costs(model: nn.Module, sites: Sites, found: Sequence[Unit], name: str) -> Costs:
    """What choices cost of a resource, exactly as `halfstep.resources` counts it."""
    return _bytes(model, sites, found) if name == "weight_bytes" else _operations(sites, found)


def _bytes(model: nn.Module, sites: Sites, found: Sequence[Unit]) -> Costs:
    shapes = {site.name: site.layout.shape for site in sites.weights}

    def saved(unit: Unit, spec: Spec | None) -> float:
        if unit.side == ACTIVATION or spec is None:
            return 0.0
        rows, columns = shapes[unit.names[0]]
        return float(packed_bytes((rows, columns), spec) - rows * columns * FLOAT_BYTES)

    return Costs(
        [np.array([saved(unit, spec) for spec in unit.choices]) for unit in found],
        {},
        float(reference_bytes(model)),
    )


def _operations(sites: Sites, found: Sequence[Unit]) -> Costs:
    place = {(unit.side, name): i for i, unit in enumerate(found) for name in unit.names}
    own = [np.zeros(len(unit.choices)) for unit in found]
    pairs: dict[tuple[int, int], np.ndarray] = {}
    constant = float(bit_operations(replace(sites, operations=()), None))
    for operation in sites.operations:
        if operation.kind == SUM:
            continue
        w = place.get((WEIGHT, operation.weight)) if operation.weight else None
        a = place[ACTIVATION, operation.activations[0]] if operation.activations else None
        weights = found[w].choices if w is not None else (None,)
        entering = found[a].choices if a is not None else (None,)
        count = len(operation.activations)
        cost = np.array(
            [[operation.macs * factor(operation, x, [y] * count) for y in entering]
             for x in weights], dtype=np.float64,
        )  # fmt: skip
        if w is not None and a is not None:
            pairs[w, a] = pairs.get((w, a), np.zeros_like(cost)) + cost
        elif w is not None:
            own[w] += cost[:, 0]
        elif a is not None:
            own[a] += cost[0]
        else:
            constant += float(cost[0, 0])
    return Costs(own, pairs, constant)


def check_budgets(model: nn.Module, sites: Sites, mixed: Mixed) -> None:
    """Raises UserError where a budget is smaller than every combination."""
    found = units(sites, mixed)
    for i, budget in enumerate(mixed.budgets):
        if budget.of_resource:
            least = resource_costs(model, sites, found, budget.name).least
            whole = resources(model, sites, None)[budget.name]
            if budget.limit * whole < least * (1 - ROUNDING):
                raise UserError(
                    f"mixed_precision.budgets[{i}].{budget.name}: {budget.limit:g} cannot be kept: "
                    f"the smallest choices come to {least / whole:.4f} of the reference"
                )
