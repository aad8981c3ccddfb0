"""Two results on the same examples, side by side: each metric's difference with an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evaluators.contrast import DIFFERENCE
from evaluators.metric import Against, Metric, Outcomes
from evaluators.stopping import EXAMPLE


@dataclass(frozen=True, eq=False)
class Side:
    """One result, and the full-precision one that it was measured beside."""

    outcomes: Outcomes
    reference: Outcomes


@dataclass(frozen=True)
class Difference:
    """A metric of two results."""

    metric: str
    first: float
    second: float
    low: float | None
    """Of the second less the first; None where the data bound nothing."""
    high: float | None

    @property
    def certain(self) -> bool:
        """Whether the interval leaves no difference out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def to_json(self) -> dict[str, object]:
        return {
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
            "difference": self.second - self.first,
            "low": self.low,
            "high": self.high,
            "certain": self.certain,
        }


def aligned(first: Side, second: Side) -> tuple[Side, Side]:
    """Both on the examples that both have seen, in one order: cells may have stopped early."""
    places = [_places(side.outcomes) for side in (first, second)]
    common = np.intersect1d(*places)
    return (_taken(first, places[0], common), _taken(second, places[1], common))


def differences(
    first: Side, second: Side, metrics: Mapping[str, Metric], confidence: float
) -> list[Difference]:
    """Every metric that has a paired test, with a two-sided interval of the difference.

    The interval joins two one-sided bounds of the metric's own test, each at half the error.
    """
    found = []
    for name, metric in metrics.items():
        if metric.test is None:
            continue
        worse = _bound(metric, second, first, confidence)
        better = _bound(metric, first, second, confidence)
        low, high = (_minus(worse), better) if metric.higher_is_better else (_minus(better), worse)
        found.append(
            Difference(
                name,
                metric.value(first.outcomes, first.reference),
                metric.value(second.outcomes, second.reference),
                low,
                high,
            )
        )
    return found


def _bound(metric: Metric, ours: Side, theirs: Side, confidence: float) -> float | None:
    """The largest loss of ``ours`` against ``theirs`` that is compatible with the data."""
    assert metric.test is not None
    against = Against(
        metric.statistic(theirs.outcomes, theirs.reference),
        metric.design(theirs.reference),
        metric.contrast(DIFFERENCE, 0.0),
    )
    statistic = metric.statistic(ours.outcomes, ours.reference)
    return metric.test.evidence([statistic], against, (1 + confidence) / 2)[0].bound


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _places(outcomes: Outcomes) -> np.ndarray:
    return outcomes[EXAMPLE] if EXAMPLE in outcomes else np.arange(len(outcomes))


def _taken(side: Side, places: np.ndarray, common: np.ndarray) -> Side:
    order = np.argsort(places)
    rows = order[np.searchsorted(places, common, sorter=order)]
    return Side(side.outcomes.take(rows), side.reference.take(common))
