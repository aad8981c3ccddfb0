"""Mixed precision: a format for each site, chosen under a budget from measured sensitivities.

Each choice is measured alone; an exact solver takes the combination with the least sum of errors
that keeps the budget. Errors add up only roughly, so the result is measured too, and repaired by
measured changes where the sum was wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from evaluators.metric import Outcomes
from halfstep.parts import parts
from halfstep.resources import resources
from halfstep.scheme import Scheme, Spec
from halfstep.treatments import Treatments
from tasks.allocate import ROUNDING, Costs, allocate
from tasks.choices import Unit, choices_of, resource_costs, scheme_of, units
from tasks.evaluated import finite, recorded
from tasks.load import Loaded
from tasks.plan import Budget, Mixed
from tasks.sensitivity import Probe, probe
from tasks.stopwatch import Stopwatch

KIND = "mixed"
TOLERANCE = 0.1
"""A measured error further from the sum than this share of it is repaired."""
ROUNDS = 8
TRIES = 8
"""Changes that are measured in each round of repair."""


@dataclass(frozen=True)
class Measured:
    """A combination, measured."""

    chosen: tuple[int, ...]
    error: float
    loss: float


@dataclass
class Search:
    """The measured choices of one subject, and the combinations that were measured so far."""

    loaded: Loaded
    treatments: Treatments
    mixed: Mixed
    on: Probe
    units: list[Unit]
    errors: Costs
    losses: Costs
    target: list[Any]
    reference: Outcomes

    def __post_init__(self) -> None:
        self._measured: dict[tuple[int, ...], Measured] = {}

    @classmethod
    def of(cls, loaded: Loaded, treatments: Treatments, mixed: Mixed) -> Search:
        """Measures every choice at every site alone."""
        on, found = probe(loaded, mixed.examples), units(loaded.sites, mixed)
        errors = [np.zeros(len(u.choices)) for u in found]
        losses = [np.zeros(len(u.choices)) for u in found]
        place = {(u.side, name): i for i, u in enumerate(found) for name in u.names}
        target: list[Any] = []
        reference: Outcomes | None = None
        done: set[tuple[str, str, Spec]] = set()
        for scheme in mixed.uniform:
            new = [
                p for p in parts(treatments, loaded.sites, scheme)
                if (p.side, p.site, p.spec) not in done
            ]  # fmt: skip
            done |= {(p.side, p.site, p.spec) for p in new}
            plain = treatments.unquantized(scheme)
            branches, outcomes = on.branch(loaded, plain, [p.alone for p in new], target or None)
            if reference is None:
                reference, target = outcomes, branches.base_answers
            for part, error, answers in zip(
                new, branches.errors[1:].mean(dim=1).tolist(), branches.answers, strict=True
            ):
                unit = place[part.side, part.site]
                choice = found[unit].choices.index(part.spec)
                errors[unit][choice] += error
                losses[unit][choice] += max(on.loss(on.outcomes(answers, reference), reference), 0)
        assert reference is not None
        return cls(loaded, treatments, mixed, on, found, Costs(errors), Costs(losses),
                   target, reference)  # fmt: skip

    def scheme(self, chosen: Sequence[int], label: str) -> Scheme:
        return scheme_of(self.units, chosen, self.mixed, self.loaded.sites, label)

    @property
    def combinations(self) -> int:
        """How many were measured."""
        return len(self._measured)

    def costs(self, name: str) -> Costs:
        """Of a resource."""
        return resource_costs(self.loaded.model, self.loaded.sites, self.units, name)

    def measure(self, chosen: Sequence[int]) -> Measured:
        """Output error and metric loss of a combination, on the examples of the choices."""
        key = tuple(chosen)
        if key not in self._measured:
            treated = self.treatments.for_scheme(self.scheme(key, "trial"))
            branches, outcomes = self.on.branch(self.loaded, treated, [], self.target)
            error = float(branches.errors[0].mean())
            self._measured[key] = Measured(key, error, self.on.loss(outcomes, self.reference))
        return self._measured[key]

    def find(self, budget: Budget) -> Found:
        """The best combination under a budget."""
        if budget.of_resource:
            kept = self.costs(budget.name)
            whole = resources(self.loaded.model, self.loaded.sites, None)[budget.name]
            start = allocate(self.errors, kept, budget.limit * whole)
            assert start is not None, "budgets are checked before a sweep begins"
            return self._repaired(budget, tuple(start), kept, budget.limit * whole)
        prices = self.costs(self.loaded.plan.objective)
        start = allocate(prices, self.losses, budget.limit)
        if start is None:
            start = [int(np.argmin(costs)) for costs in self.errors.units]
        return self._fitted(budget, tuple(start), prices)

    def _repaired(self, budget: Budget, start: tuple[int, ...], kept: Costs, limit: float) -> Found:
        """Where the sum of errors was wrong: the best of the likeliest changes within the budget,
        as long as one makes the measured error smaller."""
        predicted, current = self.errors.of(start), self.measure(start)
        first, steps = current, []
        if abs(current.error - predicted) > TOLERANCE * predicted:
            for _ in range(ROUNDS):
                moves = sorted(self._moves(current.chosen, kept, limit), key=self.errors.of)
                tried = [self.measure(chosen) for chosen in moves[:TRIES]]
                best = min(tried, key=lambda m: m.error, default=current)
                if best.error >= current.error:
                    break
                steps.append(self._step(current, best))
                current = best
        return Found(self, budget, predicted, first, current, tuple(steps))

    def _moves(
        self, chosen: tuple[int, ...], kept: Costs, limit: float
    ) -> Iterator[tuple[int, ...]]:
        """Other choices at one unit, or at two, that keep the limit."""
        single = [
            (u, c) for u, unit in enumerate(self.units) for c in range(len(unit.choices))
            if c != chosen[u]
        ]  # fmt: skip
        for i, (u, c) in enumerate(single):
            one = (*chosen[:u], c, *chosen[u + 1 :])
            if kept.of(one) <= limit * (1 + ROUNDING):
                yield one
            for v, d in single[i + 1 :]:
                if v != u:
                    two = (*one[:v], d, *one[v + 1 :])
                    if kept.of(two) <= limit * (1 + ROUNDING):
                        yield two

    def _fitted(self, budget: Budget, start: tuple[int, ...], prices: Costs) -> Found:
        """Where the loss is too large: the change that takes most error off for its price, until it
        is not; then whatever can be saved again without breaking it."""
        predicted, current = self.losses.of(start), self.measure(start)
        first, steps = current, []
        while current.loss > budget.limit:
            better = [m for m in self._singles(current.chosen)
                      if self.errors.of(m) < self.errors.of(current.chosen)]  # fmt: skip
            if not better:
                break
            best = self.measure(
                min(better, key=lambda m, c=current: self._rate(m, c.chosen, prices))
            )
            steps.append(self._step(current, best))
            current = best
        refused: set[tuple[int, ...]] = set()
        while current.loss <= budget.limit and len(refused) < TRIES:
            cheaper = [
                m
                for m in self._singles(current.chosen)
                if prices.of(m) < prices.of(current.chosen) and m not in refused
            ]
            if not cheaper:
                break
            chosen = min(cheaper, key=lambda m, c=current: self._rate(m, c.chosen, prices))
            tried = self.measure(chosen)
            if tried.loss > budget.limit:
                refused.add(chosen)
                continue
            steps.append(self._step(current, tried))
            current = tried
        return Found(self, budget, predicted, first, current, tuple(steps))

    def _singles(self, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        for u, unit in enumerate(self.units):
            for c in range(len(unit.choices)):
                if c != chosen[u]:
                    yield (*chosen[:u], c, *chosen[u + 1 :])

    def _rate(self, other: tuple[int, ...], chosen: tuple[int, ...], prices: Costs) -> float:
        """How much error a change brings for each unit of price it saves, or takes off for each
        that it costs: the smaller the better, either way."""
        error = self.errors.of(other) - self.errors.of(chosen)
        price = prices.of(other) - prices.of(chosen)
        return error / max(abs(price), 1e-12)

    def _step(self, before: Measured, after: Measured) -> dict[str, Any]:
        changed = [
            f"{', '.join(unit.names)} {unit.side}: {unit.choices[a] or 'fp32'} to "
            f"{unit.choices[b] or 'fp32'}"
            for unit, a, b in zip(self.units, before.chosen, after.chosen, strict=True)
            if a != b
        ]
        return {"changed": changed, "output_error": after.error, "metric_loss": after.loss}


@dataclass(frozen=True, eq=False)
class Found:
    """A mixed scheme, with what was predicted of it and what was measured."""

    search: Search
    budget: Budget
    predicted: float
    """The sum that the solver worked with: of errors, or of losses for a budget of those."""
    first: Measured
    """The solver's own answer."""
    last: Measured
    """After repair."""
    steps: tuple[dict[str, Any], ...]

    @property
    def scheme(self) -> Scheme:
        return self.search.scheme(self.last.chosen, self.budget.label)

    def to_json(self) -> dict[str, Any]:
        search, loaded = self.search, self.search.loaded
        scheme = self.scheme
        return {
            "budget": {self.budget.name: self.budget.limit},
            "scheme": scheme.name,
            **resources(loaded.model, loaded.sites, scheme),
            "predicted": self.predicted,
            "predicted_of": "output_error" if self.budget.of_resource else search.on.headline.name,
            "measured_first": {"output_error": self.first.error, "metric_loss": self.first.loss},
            "measured": {"output_error": self.last.error, "metric_loss": self.last.loss},
            "sum_of_errors": search.errors.of(self.last.chosen),
            "chosen": list(self.last.chosen),
            "steps": list(self.steps),
            "kept": self.budget.of_resource or self.last.loss <= self.budget.limit,
            "choices": [
                {
                    "sites": list(unit.names),
                    "side": unit.side,
                    "chosen": str(unit.choices[c] or "fp32"),
                    "output_error_alone": float(search.errors.units[i][c]),
                    "metric_loss_alone": float(search.losses.units[i][c]),
                }
                for i, (unit, c) in enumerate(zip(search.units, self.last.chosen, strict=True))
            ],
        }


def uniform_json(search: Search) -> list[dict[str, Any]]:
    """The uniform schemes of the same choices, measured on the same examples."""
    loaded, found = search.loaded, []
    for scheme in search.mixed.uniform:
        measured = search.measure(choices_of(search.units, scheme, loaded.sites))
        found.append(
            {
                "scheme": scheme.name,
                **resources(loaded.model, loaded.sites, scheme),
                "output_error": measured.error,
                "metric_loss": measured.loss,
            }
        )
    return found


def run_mixed(
    loaded: Loaded, treatments: Treatments, sweep: SweepFolder
) -> tuple[list[Scheme], Record, Path]:
    """The mixed schemes of a plan, one a budget, recorded; taken from the record where it is there
    already."""
    mixed = loaded.plan.mixed
    assert mixed is not None
    key = loaded.key(kind=KIND, mixed=mixed.to_json(), objective=loaded.plan.objective,
                     overrides=[o.to_json() for o in mixed.overrides])  # fmt: skip
    place = sweep.place(KIND, key)
    record = recorded(sweep, KIND, key)
    if record is not None:
        made = units(loaded.sites, mixed)
        schemes = [
            scheme_of(made, found["chosen"], mixed, loaded.sites, budget.label)
            for found, budget in zip(record.detail["found"], mixed.budgets, strict=True)
        ]
        return schemes, record, place
    timer = Stopwatch()
    search = Search.of(loaded, treatments, mixed)
    results = [search.find(budget) for budget in mixed.budgets]
    detail = {
        "task": search.on.task.name,
        "metric": search.on.headline.name,
        "examples": len(search.on.examples),
        "found": [result.to_json() for result in results],
        "uniform": uniform_json(search),
    }
    metrics = {"combinations_measured": float(search.combinations),
               "seconds": timer.elapsed}  # fmt: skip
    for result in results:
        metrics[f"{result.budget.name}_{result.budget.limit:g}_predicted"] = result.predicted
        metrics[f"{result.budget.name}_{result.budget.limit:g}_output_error"] = result.last.error
    base = Record(KIND, key, "mixed precision", metrics=finite(metrics), detail=detail,
                  tags={"task": search.on.task.name}, started=timer.started)  # fmt: skip
    files = {
        "mixed.json": encode.json_bytes(detail),
        "choices.csv": encode.csv_bytes(_choice_rows(search)),
    }
    return [r.scheme for r in results], spool.commit(place, base, files), place


def _choice_rows(search: Search) -> list[dict[str, object]]:
    """Every choice of every unit, as it was measured alone."""
    return [
        {
            "sites": ", ".join(unit.names),
            "side": unit.side,
            "choice": str(choice or "fp32"),
            "output_error": float(search.errors.units[u][c]),
            "metric_loss": float(search.losses.units[u][c]),
        }
        for u, unit in enumerate(search.units)
        for c, choice in enumerate(unit.choices)
    ]
