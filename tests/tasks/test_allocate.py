"""The allocation's optimum, against every combination there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.allocate import Costs, allocate


def best(least, kept, limit):
    """By trying all."""
    sizes = [range(len(c)) for c in least.units]
    kept_ones = [c for c in itertools.product(*sizes) if kept.of(c) <= limit]
    return min((least.of(c) for c in kept_ones), default=None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_it_finds_what_trying_all_finds(seed, units, paired):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 4, units)
    errors = Costs([generator.random(n) for n in sizes])
    pairs = {}
    if paired and units > 1:
        pairs = {(0, 1): generator.random((sizes[0], sizes[1])) * 5}
    prices = Costs([generator.integers(1, 50, n) * 1.0 for n in sizes], pairs, constant=7.0)
    limit = prices.least + float(generator.random()) * 60
    found = allocate(errors, prices, limit)
    assert found is not None
    assert prices.of(found) <= limit + 1e-6
    assert errors.of(found) == pytest.approx(best(errors, prices, limit))


def test_what_no_choice_keeps_is_said():
    prices = Costs([np.array([3.0, 4.0])])
    assert allocate(prices, prices, 2.9) is None
    assert allocate(prices, prices, 3.0) == [0]


def test_small_numbers_count():
    """Errors of 1e-9 beside bytes of 1e9: the solver's tolerances must not swallow them."""
    errors = Costs([np.array([4e-9, 1e-9]), np.array([3e-9, 1e-9])])
    prices = Costs([np.array([1e9, 2e9]), np.array([1e9, 2e9])])
    assert allocate(errors, prices, 3e9) == [1, 0]


def test_a_budget_that_is_a_quotient_is_met_exactly():
    """What a share of the whole comes back as may be a last digit short of the size it was."""
    errors = Costs([np.array([1.0, 4.0]), np.array([1.0, 4.0])])
    prices = Costs([np.array([200_000.0, 100_000.0]), np.array([200_000.0, 100_000.0])])
    for short in (0.0, 1e-11, 3e-5):
        assert allocate(errors, prices, 400_000.0 - short) == [0, 0]
    assert sorted(allocate(errors, prices, 399_999.0)) == [0, 1]
