"""The ratio of paired proportions: against a direct maximisation, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from evaluators import matched_ratio

tables = st.tuples(
    st.integers(1, 300), st.integers(0, 40), st.integers(0, 40), st.integers(1, 100)
).map(lambda t: (t[0], t[1], t[2], sum(t)))


def likelihood_score(both, losses, gains, n, ratio):
    """The same statistic with the nuisance found by a numeric search of the likelihood."""
    known = (both + losses + gains) / n

    def rates(gain):
        return ratio * known - (1 + ratio) * gain, known * (1 - ratio) + ratio * gain, gain

    def negative(gain):
        counts = (both, losses, gains)
        return -sum(c * math.log(max(p, 1e-300)) for c, p in zip(counts, rates(gain), strict=True))

    low, high = max(0.0, known * (ratio - 1) / ratio), ratio * known / (1 + ratio)
    found = minimize_scalar(negative, bounds=(low, high), method="bounded",
                            options={"xatol": 1e-13})  # fmt: skip
    _, loss, gain = rates(found.x)
    return (both + gains - ratio * (both + losses)) / math.sqrt(n * ratio * (gain + loss))


@given(tables, st.floats(0.6, 1.6))
def test_the_closed_form_is_the_maximum_of_the_likelihood(table, ratio):
    theirs = likelihood_score(*table, ratio)
    assert matched_ratio.score(*table, ratio) == pytest.approx(theirs, abs=2e-3, rel=2e-3)


@given(tables, st.floats(0.6, 1.6))
def test_exchanging_the_two_inverts_the_ratio(table, ratio):
    both, losses, gains, n = table
    there = matched_ratio.score(both, losses, gains, n, ratio)
    back = matched_ratio.score(both, gains, losses, n, 1 / ratio)
    assert there == pytest.approx(-back, abs=1e-9)


@given(tables, st.booleans())
def test_the_bound_is_where_the_test_just_decides(table, lower):
    found = matched_ratio.bound(*table, 0.95, lower=lower)
    if 1e-6 < found < 1e6 and not math.isclose(found, (table[0] + table[2]) / sum(table[:2])):
        p = matched_ratio.noninferiority_p if lower else matched_ratio.inferiority_p
        assert p(*table, found) == pytest.approx(0.05, abs=1e-6)


def test_false_acceptance_at_the_margin_is_the_level():
    """Reference right 85 %, cell at exactly 99 % of that, 2 % flips: 20,000 draws of 1,500."""
    theirs, drop = 0.85, 0.0085
    loss, gain = (0.02 + drop) / 2, (0.02 - drop) / 2
    rates = [theirs - loss, loss, gain, 1 - theirs - gain]
    drawn = np.random.default_rng(0).multinomial(1500, rates, size=20_000)
    accepted = np.mean(
        [matched_ratio.noninferiority_p(a, b, c, 1500, 0.99) <= 0.05 for a, b, c, _ in drawn]
    )
    assert accepted == pytest.approx(0.05, abs=0.006)
