"""Gaffke's test: the exact binomial test where values are 0 and 1, and never too optimistic."""

import numpy as np
import pytest
from scipy.stats import beta, binom

from evaluators.bounded_mean import bounded_means


@pytest.mark.parametrize(("losses", "n"), [(0, 300), (1, 500), (7, 200)])
def test_of_zeros_and_ones_it_is_clopper_and_pearson(losses, n):
    values = np.zeros((1, n))
    values[0, :losses] = 1
    found = bounded_means(values, np.ones(1))[0]
    assert found.upper(0.95) == pytest.approx(beta.ppf(0.95, losses + 1, n - losses), rel=0.04)
    for mean in (0.01, 0.03):
        assert found.p_at_least(mean) == pytest.approx(binom.cdf(losses, n, mean), abs=0.012)


def test_a_worst_case_is_always_counted_in():
    tight, wide = bounded_means(np.zeros((2, 100)), np.array([1.0, 2.0]))
    assert wide.upper(0.95) == pytest.approx(2 * tight.upper(0.95), rel=1e-9)


@pytest.mark.parametrize("level", [0.05, 0.01])
def test_rare_large_losses_are_not_accepted_too_often(level):
    """A loss of 1 in 1 % of examples: where few occur a bootstrap accepts far too often."""
    generator, trials, n = np.random.default_rng(1), 400, 500
    values = (generator.random((trials, n)) < 0.01).astype(float)
    values -= 0.001 * generator.random((trials, n))  # and all else a little better
    margin = 0.01 - 0.0005
    found = bounded_means(values, np.ones(trials))
    accepted = np.mean([one.p_at_least(margin) <= level for one in found])
    assert accepted <= level + 3 * np.sqrt(level / trials)
