"""Stopping early: a cell whose verdict is certain needs no more examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from evaluators.criterion import Criterion
from evaluators.metric import Metric, Outcomes
from evaluators.sequential import p_value
from evaluators.slices import slices

EXAMPLE = "example"
"""The column that says which examples of the split were seen, where not all were."""
EARLY_SHARE = 0.2
"""Of the error level, for verdicts before the last example; the rest is for the tests on all."""
FEWEST = 32
"""Examples before the first look."""
GROWTH = 1.25
"""Each look comes after so many times the examples of the one before."""
_SEED = 20260418


@dataclass(frozen=True)
class Stop:
    """When a cell stopped, why, and what it had shown."""

    verdict: str
    examples: int
    of: int
    why: str
    p_values: Mapping[str, tuple[float, float]]
    """By the criterion's label: against "the loss is at least the margin", and at most. Valid at
    any time."""

    def __str__(self) -> str:
        return f"stopped at {self.examples:,} of {self.of:,} examples: {self.why}"

    def to_json(self) -> dict[str, object]:
        return {
            "verdict": self.verdict,
            "examples": self.examples,
            "of": self.of,
            "why": self.why,
            "p_values": {name: list(pair) for name, pair in self.p_values.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Stop:
        pairs: Mapping[str, Sequence[float]] = value["p_values"]  # type: ignore[assignment]
        read = {name: (pair[0], pair[1]) for name, pair in pairs.items()}
        return cls(**{**value, "p_values": read})  # type: ignore[arg-type]


def looks(size: int, clusters: np.ndarray | None = None, step: int = 1) -> list[np.ndarray]:
    """The order in which examples are seen, cut into the parts between looks, each a multiple of
    ``step`` where examples are not clustered, so that batches stay full.

    Random, so that whatever was seen is a sample of the whole however the data was sorted; always
    the same for one size. Clusters stay whole.
    """
    generator = np.random.default_rng([_SEED, size])
    if clusters is None:
        order, ends = generator.permutation(size), np.arange(1, size + 1)
    else:
        _, which = np.unique(clusters, return_inverse=True)
        place = generator.permutation(which.max() + 1)[which]
        order = np.argsort(place, kind="stable")
        ends = np.flatnonzero(np.r_[np.diff(place[order]) > 0, True]) + 1
    cuts = [0]
    while cuts[-1] < size:
        target = math.ceil(max(FEWEST, GROWTH * cuts[-1], cuts[-1] + 1) / step) * step
        at = ends[min(int(np.searchsorted(ends, target)), len(ends) - 1)]
        # A last part that is not worth a look goes with the one before.
        cuts.append(size if at * GROWTH >= size else int(at))
    return [np.sort(order[a:b]) for a, b in pairwise(cuts)]


@dataclass
class Watch:
    """Follows one cell from look to look."""

    criteria: Sequence[Criterion]
    metrics: Mapping[str, Metric]
    reference: Outcomes
    """On all examples."""
    cells: int
    """How many cells the verdict is corrected for."""
    max_unscored: float = 0.0
    ruled_out: str = ""
    """Why the cell is rejected whatever it shows; empty where it is not."""
    _best: dict[str, list[float]] = field(default_factory=dict)

    def look(self, seen: Outcomes) -> Stop | None:
        """A verdict, if it is certain after these examples, with what they are of the whole in the
        column `EXAMPLE`."""
        tested = [rule for rule in self.criteria if not rule.counted]
        theirs = self.reference.take(seen[EXAMPLE])
        for rule in tested:
            found = self._p_values(rule, seen, theirs)
            best = self._best.setdefault(rule.label, [1.0, 1.0])
            self._best[rule.label] = [min(pair) for pair in zip(best, found, strict=True)]
        if self.ruled_out:
            return self._stop("reject", seen, self.ruled_out)
        if seen.unscored > self.max_unscored * len(self.reference):
            return self._stop("reject", seen, "too many outputs are NaN or infinite")
        worse = [r for r in tested if self._certain(r, 1, len(tested))]
        if worse:
            names = " and ".join(rule.label for rule in worse)
            return self._stop("reject", seen, f"{names} certainly fails")
        if tested and all(self._certain(rule, 0, 1) for rule in tested):
            return self._stop("accept", seen, "every criterion is certainly met")
        return None

    def _certain(self, rule: Criterion, side: int, tests: int) -> bool:
        return self._best[rule.label][side] * tests <= self._level(rule)

    def _level(self, rule: Criterion) -> float:
        """What early looks at one cell may use of a criterion's own."""
        return rule.level * EARLY_SHARE / self.cells

    def _stop(self, verdict: str, seen: Outcomes, why: str) -> Stop:
        pairs = {name: (pair[0], pair[1]) for name, pair in self._best.items()}
        return Stop(verdict, len(seen), len(self.reference), why, pairs)

    def _p_values(self, rule: Criterion, seen: Outcomes, theirs: Outcomes) -> tuple[float, float]:
        if rule.slice is None:
            return self._of(rule, seen, theirs)
        judged = slices(self.reference, rule.slice, rule.min_examples)
        present = slices(theirs, rule.slice)
        if not judged.keys() <= present.keys():
            return 1.0, 1.0
        found = [
            self._of(rule, seen.take(present[value]), theirs.take(present[value]))
            for value in judged
        ]
        return max(p for p, _ in found), min(1.0, min(p for _, p in found) * len(found))

    def _of(self, rule: Criterion, seen: Outcomes, theirs: Outcomes) -> tuple[float, float]:
        metric = self.metrics[rule.metric]
        assert metric.test is not None
        below, above = metric.test.capital(
            metric.statistic(seen, theirs),
            metric.against(theirs, metric.contrast(rule.kind, rule.margin)),
            len(self.reference) / len(seen),
            self._level(rule),
        )
        return tuple(p_value(c) if not math.isnan(c) else 1.0 for c in (below, above))  # type: ignore[return-value]
