"""Two results side by side: the difference's sign, its interval, and examples in another order."""

import numpy as np
import pytest
from scipy.stats import norm

from evaluators import EVALUATORS
from evaluators.comparison import Side, aligned, differences
from evaluators.metric import Outcomes
from evaluators.stopping import EXAMPLE

METRICS = EVALUATORS["regression"]().metrics


def classified(right):
    """Outcomes of a classifier of which only hits and misses count here."""
    right = np.asarray(right, bool)
    return Outcomes({"scored": np.ones(len(right), bool), "correct": right,
                     "label": np.zeros(len(right), np.int64),
                     "prediction": (~right).astype(np.int64)})  # fmt: skip


ACCURACY = {"accuracy": EVALUATORS["image_classification"]().metrics["accuracy"]}


def hits(n, right, seed):
    generator = np.random.default_rng(seed)
    return generator.random(n) < right


def test_the_difference_is_the_second_less_the_first_and_swaps_its_sign():
    reference = classified(hits(400, 0.95, 0))
    one, two = (Side(classified(hits(400, p, s)), reference) for p, s in ((0.9, 1), (0.7, 2)))
    forth = differences(one, two, ACCURACY, 0.95)[0]
    back = differences(two, one, ACCURACY, 0.95)[0]
    assert forth.second < forth.first
    assert forth.high < 0
    assert forth.certain
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))


def test_lower_is_better_changes_no_sign():
    metric = next(m for m in METRICS.values() if m.test is not None and not m.higher_is_better)
    n, generator = 300, np.random.default_rng(0)
    target = generator.normal(size=(n, 1))
    reference = Outcomes({"scored": np.ones(n, bool), "target": target, "prediction": target})
    sides = [
        Side(
            reference.beside({"prediction": target + scale * generator.normal(size=(n, 1))}),
            reference,
        )
        for scale in (0.1, 0.3)
    ]
    found = differences(*sides, {metric.name: metric}, 0.95)[0]
    assert found.second > found.first
    assert 0 < found.low < found.second - found.first < found.high


def test_the_interval_covers_as_often_as_it_says():
    """Paired accuracies, 4 % flips one way and 2 % the other: the true difference is -0.02."""
    generator, inside = np.random.default_rng(5), 0
    for _ in range(300):
        kinds = generator.choice(4, 300, p=[0.84, 0.04, 0.02, 0.10])
        first = classified((kinds == 0) | (kinds == 1))
        second = classified((kinds == 0) | (kinds == 2))
        found = differences(Side(first, first), Side(second, first), ACCURACY, 0.9)[0]
        inside += found.low <= -0.02 <= found.high
    sd = np.sqrt(0.9 * 0.1 / 300)
    assert abs(inside / 300 - 0.9) < norm.ppf(0.999) * sd


def test_cells_that_stopped_early_are_compared_on_what_both_have_seen():
    right = hits(100, 0.8, 3)
    whole = classified(right)
    seen = np.array([7, 3, 50, 99, 0])
    some = whole.take(seen).beside({EXAMPLE: seen})
    one, two = aligned(Side(some, whole), Side(whole, whole))
    assert len(one.outcomes) == len(two.outcomes) == 5
    for side in (one, two):
        np.testing.assert_array_equal(side.outcomes["correct"], right[np.sort(seen)])
        np.testing.assert_array_equal(side.reference["correct"], right[np.sort(seen)])


def test_equal_results_differ_by_nothing_and_are_never_certain():
    same = classified(hits(200, 0.9, 1))
    found = differences(Side(same, same), Side(same, same), ACCURACY, 0.95)[0]
    assert found.first == found.second
    assert not found.certain
