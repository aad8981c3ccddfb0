"""Tango's interval: against a direct maximisation, and its coverage by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from evaluators import tango
from evaluators.paired import decisive

tables = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 400)).map(
    lambda t: (t[0], t[1], t[0] + t[1] + t[2])
)


def likelihood_score(losses, gains, n, drop):
    """The same statistic with the nuisance found by a numeric search of the likelihood."""

    def negative(q):
        p12, p21, rest = q + drop, q, 1 - 2 * q - drop
        total = 0.0
        for count, p in ((losses, p12), (gains, p21), (n - losses - gains, rest)):
            if count:
                total -= count * math.log(max(p, 1e-300))
        return total

    low, high = max(0.0, -drop), (1 - drop) / 2
    q = minimize_scalar(negative, bounds=(low, high), method="bounded",
                        options={"xatol": 1e-13}).x  # fmt: skip
    return (losses - gains - n * drop) / math.sqrt(n * (2 * q + drop * (1 - drop)))


@given(tables, st.floats(0.01, 0.3))
def test_score_equals_a_numeric_maximisation_of_the_likelihood(table, drop):
    assert tango.score(*table, drop) == pytest.approx(likelihood_score(*table, drop), abs=2e-3)


@given(tables)
def test_the_bound_is_where_the_test_turns(table):
    bound = tango.upper_bound(*table, 0.95)
    losses, gains, n = table
    assert (losses - gains) / n <= bound <= 1
    if bound < 0.999:
        assert tango.noninferiority_p(*table, bound) == pytest.approx(0.05, abs=1e-6)
    assert tango.lower_bound(*table, 0.95) <= (losses - gains) / n + 1e-12


@given(tables, st.floats(0.005, 0.2))
def test_the_two_p_values_of_one_margin_sum_to_one(table, margin):
    total = tango.noninferiority_p(*table, margin) + tango.inferiority_p(*table, margin)
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("table", [(1, 0, 44), (9, 4, 120), (0, 7, 60)])
def test_both_limits_solve_the_score_equation(table):
    z = norm.ppf(0.975)
    assert likelihood_score(*table, tango.upper_bound(*table, 0.975)) == pytest.approx(-z, abs=0.01)
    assert likelihood_score(*table, tango.lower_bound(*table, 0.975)) == pytest.approx(z, abs=0.01)


@pytest.mark.parametrize("n", [100, 800])
def test_no_discordant_pair_gives_the_closed_form(n):
    z2 = norm.ppf(0.95) ** 2
    assert tango.upper_bound(0, 0, n, 0.95) == pytest.approx(z2 / (n + z2), rel=1e-6)


@pytest.mark.parametrize(("loss", "gain"), [(0.01, 0.01), (0.03, 0.01), (0.05, 0.02), (0.10, 0.10)])
@pytest.mark.parametrize("n", [200, 1000])
def test_one_sided_coverage_by_simulation(loss, gain, n):
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(n, [loss, gain, 1 - loss - gain], size=2000)
    seen = {}
    for losses, gains, _ in drawn.tolist():
        if (losses, gains) not in seen:
            seen[losses, gains] = tango.upper_bound(losses, gains, n, 0.95)
    covered = np.mean([seen[a, b] >= loss - gain for a, b, _ in drawn.tolist()])
    assert 0.935 <= covered <= 0.985


def test_acceptance_at_the_margin_keeps_its_level():
    """A cell that is exactly the margin worse is accepted in about 5 % of sweeps, not in 57 %."""
    generator = np.random.default_rng(1)
    drawn = generator.multinomial(500, [0.015, 0.005, 0.98], size=4000)
    accepted = np.mean(
        [tango.noninferiority_p(a, b, 500, 0.01) <= 0.05 for a, b, _ in drawn.tolist()]
    )
    assert accepted == pytest.approx(0.046, abs=0.015)


def examples_needed(losses, gains, n, margin, level):
    def p_at(factor):
        scaled = (losses * factor, gains * factor, n * factor, margin)
        return min(tango.noninferiority_p(*scaled), tango.inferiority_p(*scaled))

    factor = decisive(p_at, level)
    return None if factor is None else math.ceil(n * factor)


@pytest.mark.parametrize(("losses", "gains", "n"), [(5, 3, 500), (0, 0, 300), (20, 4, 600)])
def test_the_number_of_examples_that_is_named_does_settle_it(losses, gains, n):
    margin, level = 0.01, 0.01
    needed = examples_needed(losses, gains, n, margin, level)
    accept = (losses - gains) / n < margin
    p_value = tango.noninferiority_p if accept else tango.inferiority_p
    for count, decided in ((needed * 1.01, True), (needed * 0.97, False)):
        scale = count / n
        assert (p_value(losses * scale, gains * scale, count, margin) <= level) == decided


def test_a_loss_that_equals_the_margin_is_never_settled():
    assert examples_needed(5, 0, 500, 0.01, 0.05) is None
