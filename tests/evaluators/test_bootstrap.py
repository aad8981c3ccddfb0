"""The paired BCa bootstrap against SciPy's, and its error rate by simulation."""

import numpy as np
import pytest
import scipy.stats

from evaluators.bootstrap import paired_bootstrap


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def features(values):
    return np.stack([values, np.ones(len(values))], axis=1)


def skewed(n, seed=0):
    generator = np.random.default_rng(seed)
    reference = generator.lognormal(sigma=0.6, size=n)
    return reference, reference + generator.gamma(0.5, 0.1, size=n) - 0.02


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_limits_agree_with_scipy(confidence):
    reference, cell = skewed(400)
    ours = paired_bootstrap([features(cell)], features(reference), mean)[0]
    theirs = scipy.stats.bootstrap(
        (cell - reference,), np.mean, confidence_level=2 * confidence - 1, method="BCa",
        n_resamples=20_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    tolerance = 0.06 * (theirs.high - theirs.low)
    assert ours.quantile(confidence) == pytest.approx(theirs.high, abs=tolerance)
    assert ours.quantile(1 - confidence) == pytest.approx(theirs.low, abs=tolerance)


@pytest.mark.parametrize("level", [0.2, 0.05, 0.01])
def test_p_value_inverts_the_limit(level):
    reference, cell = skewed(300)
    sample = paired_bootstrap([features(cell)], features(reference), mean)[0]
    assert sample.p_above(sample.quantile(1 - level)) == pytest.approx(level, rel=0.05)
    assert (-sample).quantile(0.95) == pytest.approx(-sample.quantile(0.05), abs=1e-12)


def test_cells_do_not_influence_each_other_and_sparse_equals_dense():
    reference, cell = skewed(300)
    sparse = reference.copy()
    sparse[::50] += 1.0
    together = paired_bootstrap([features(cell), features(sparse)], features(reference), mean)
    for one, values in zip(together, (cell, sparse), strict=True):
        alone = paired_bootstrap([features(values)], features(reference), mean)[0]
        assert np.array_equal(one.resampled, alone.resampled)


def test_the_same_data_give_the_same_bits():
    reference, cell = skewed(200)
    runs = [paired_bootstrap([features(cell)], features(reference), mean)[0] for _ in range(2)]
    assert np.array_equal(runs[0].resampled, runs[1].resampled)


def test_equal_outcomes_are_degenerate():
    reference, _ = skewed(100)
    assert paired_bootstrap([features(reference)], features(reference), mean)[0].degenerate


def test_a_loss_at_the_margin_is_accepted_at_about_the_level():
    generator = np.random.default_rng(3)
    accepted = 0
    for _ in range(300):
        reference = generator.lognormal(size=200)
        cell = reference + generator.normal(0.05, 0.3, size=200)
        sample = paired_bootstrap([features(cell)], features(reference), mean, resamples=1000)[0]
        accepted += sample.p_above(0.05) <= 0.05
    assert 0.02 <= accepted / 300 <= 0.09
