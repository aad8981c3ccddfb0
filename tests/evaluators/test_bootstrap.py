"""The paired BCa bootstrap against SciPy's, and its error rate by simulation."""

import numpy as np
import pytest
import scipy.stats

from evaluators.bootstrap import paired_bootstrap, resampling_counts
from evaluators.metric import Design, Sums, Weighted


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def mean(values):
    return Sums(np.stack([values, np.ones(len(values))], axis=1), ratio)


def weighted_mean(values):
    return Weighted(len(values), lambda counts: counts @ values / counts.sum(axis=1))


def skewed(n, seed=0):
    generator = np.random.default_rng(seed)
    reference = generator.lognormal(sigma=0.6, size=n)
    return reference, reference + generator.gamma(0.5, 0.1, size=n) - 0.02


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_limits_agree_with_scipy(confidence):
    reference, cell = skewed(400)
    ours = paired_bootstrap([mean(cell)], mean(reference))[0]
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
    sample = paired_bootstrap([mean(cell)], mean(reference))[0]
    assert sample.p_above(sample.quantile(1 - level)) == pytest.approx(level, rel=0.05)
    assert (-sample).quantile(0.95) == pytest.approx(-sample.quantile(0.05), abs=1e-12)


def test_cells_do_not_influence_each_other_and_sparse_equals_dense():
    reference, cell = skewed(300)
    sparse = reference.copy()
    sparse[::50] += 1.0
    together = paired_bootstrap([mean(cell), mean(sparse)], mean(reference))
    for one, values in zip(together, (cell, sparse), strict=True):
        alone = paired_bootstrap([mean(values)], mean(reference))[0]
        assert np.array_equal(one.resampled, alone.resampled)


def test_the_same_data_give_the_same_bits():
    reference, cell = skewed(200)
    runs = [paired_bootstrap([mean(cell)], mean(reference))[0] for _ in range(2)]
    assert np.array_equal(runs[0].resampled, runs[1].resampled)


def test_equal_outcomes_are_degenerate():
    reference, _ = skewed(100)
    assert paired_bootstrap([mean(reference)], mean(reference))[0].degenerate


def test_a_loss_at_the_margin_is_accepted_at_about_the_level():
    generator = np.random.default_rng(3)
    accepted = 0
    for _ in range(300):
        reference = generator.lognormal(size=200)
        cell = reference + generator.normal(0.05, 0.3, size=200)
        sample = paired_bootstrap([mean(cell)], mean(reference), resamples=1000)[0]
        accepted += sample.p_above(0.05) <= 0.05
    assert 0.02 <= accepted / 300 <= 0.09


def test_statistics_of_sums_and_of_weights_agree():
    reference, cell = skewed(300)
    sums = paired_bootstrap([mean(cell)], mean(reference))[0]
    weights = paired_bootstrap([weighted_mean(cell)], weighted_mean(reference))[0]
    assert np.allclose(sums.resampled, weights.resampled)
    assert sums.observed == pytest.approx(weights.observed)
    assert sums.acceleration == pytest.approx(weights.acceleration, abs=1e-9)


def test_clusters_are_drawn_whole():
    """The error of a mean of m equal values a cluster is that of one value a cluster."""
    generator = np.random.default_rng(5)
    reference, change = generator.normal(size=60), generator.normal(0, 0.1, size=60)
    clusters = np.repeat(np.arange(60), 8)
    design = Design(clusters=clusters)
    for make in (mean, weighted_mean):
        one = paired_bootstrap([make(reference + change)], make(reference))[0]
        many = paired_bootstrap(
            [make(np.repeat(reference + change, 8))], make(np.repeat(reference, 8)), design
        )[0]
        assert np.allclose(
            one.resampled[: len(many.resampled)].std(), many.resampled.std(), rtol=0.05
        )
        assert one.acceleration == pytest.approx(many.acceleration, abs=1e-9)


def test_strata_keep_their_numbers():
    strata = np.array([0] * 7 + [1] * 13)
    for counts in resampling_counts(20, 500, strata):
        assert (counts[:, :7].sum(axis=1) == 7).all()
        assert (counts[:, 7:].sum(axis=1) == 13).all()


def test_the_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    whole = np.concatenate(list(resampling_counts(50, 300)))
    monkeypatch.setattr("evaluators.bootstrap._CHUNK", 7)
    assert np.array_equal(np.concatenate(list(resampling_counts(50, 300))), whole)
