"""What tests of each kind of outcome say, against SciPy and closed forms."""

import numpy as np
import pytest
from judging import candidate, flipped, outcomes
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap

from evaluators import paired
from evaluators.acceptance import ACCEPT, REJECT, Trial, judge
from evaluators.classification import METRICS
from evaluators.contrast import ALONE, DIFFERENCE, RELATIVE, Contrast
from evaluators.criterion import Criterion
from evaluators.metric import Against, Design
from evaluators.statistics import auroc, mean, spearman


@pytest.fixture
def base():
    return np.random.default_rng(0).random(2000) < 0.9


def test_a_relative_bootstrap_is_that_of_the_ratio():
    generator = np.random.default_rng(1)
    theirs = generator.lognormal(0, 0.5, 400)
    ours = theirs * 1.02 + generator.normal(0, 0.05, 400)
    contrast = Contrast(RELATIVE, 0.05, False)
    found = paired.bootstrap.evidence(
        [mean(ours)], Against(mean(theirs), Design(), contrast), 0.95
    )[0]
    wanted = scipy_bootstrap(
        (ours, theirs), lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis) - 1,
        paired=True, method="BCa", confidence_level=0.9, n_resamples=10_000,
        rng=np.random.default_rng(2),
    )  # fmt: skip
    assert found.bound == pytest.approx(wanted.confidence_interval.high, rel=0.03)
    assert found.p_accept < 0.05 < found.p_reject


@pytest.mark.parametrize("higher", [True, False])
def test_a_floor_or_ceiling_of_hits_is_exact(higher):
    hits = np.r_[np.ones(470), np.zeros(30)] if higher else np.r_[np.ones(30), np.zeros(470)]
    limit = 0.92 if higher else 0.08
    contrast = Contrast(ALONE, limit, higher)
    found = paired.binary.evidence([mean(hits)], Against(mean(hits), Design(), contrast), 0.95)[0]
    side = "greater" if higher else "less"
    wanted = binomtest(int(hits.sum()), 500, limit, alternative=side)
    interval = wanted.proportion_ci(0.95)
    assert found.p_accept == pytest.approx(wanted.pvalue)
    assert found.bound == pytest.approx(
        limit - interval.low if higher else interval.high - limit, abs=1e-9
    )


def test_where_no_rank_moved_the_bound_is_that_of_disjoint_pairs():
    generator = np.random.default_rng(3)
    positive = np.arange(400) < 100
    scores = generator.normal(size=400) + positive
    statistic, design = auroc(scores, positive), Design(strata=positive)
    contrast = Contrast(DIFFERENCE, 0.05, True)
    test = paired.Bootstrapped(span=1, order=2)
    found = test.evidence([statistic], Against(statistic, design, contrast), 0.95)[0]
    assert found.p_accept == pytest.approx(0.95**100)
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 100))
    assert found.needed(1e-4) == pytest.approx(400 * np.log(1e-4) / np.log(0.95) / 100, abs=1)
    same = spearman(scores, generator.normal(size=400))
    found = paired.Bootstrapped(span=6, order=3).evidence(
        [same], Against(same, Design(), contrast), 0.95
    )
    assert found[0].p_accept == pytest.approx((1 - 0.05 / 6) ** 133)


def test_where_one_example_may_do_anything_nothing_moved_says_nothing():
    losses = mean(np.random.default_rng(4).lognormal(size=300))
    contrast = Contrast(DIFFERENCE, 0.05, False)
    found = paired.bootstrap.evidence([losses], Against(losses, Design(), contrast), 0.95)[0]
    assert (found.bound, found.p_accept, found.p_reject) == (None, 1.0, 1.0)
    assert "no outcome differs" in found.note


def test_bounded_means_are_judged_together_as_one_by_one():
    generator = np.random.default_rng(5)
    theirs = generator.random(200)
    cells = [np.clip(theirs - shift, 0, 1) for shift in (0.0, 0.02, 0.2)]
    contrast = Contrast(DIFFERENCE, 0.05, True)
    against = Against(mean(theirs), Design(), contrast)
    together = paired.bounded.evidence([mean(c) for c in cells], against, 0.95)
    for cell, found in zip(cells, together, strict=True):
        alone = paired.bounded.evidence(
            [mean(cell)], Against(mean(theirs), Design(), contrast), 0.95
        )[0]
        assert (alone.bound, alone.p_accept) == (found.bound, found.p_accept)
    assert [found.p_accept < 0.05 for found in together] == [True, True, False]
    assert together[2].p_reject < 0.01


REASONS = {
    ("max_relative_drop", 0.02): "accuracy relative drop +0.00%, at most +0.",
    ("floor", 0.8): "accuracy 0.9005, at least 0.",
}


@pytest.mark.parametrize(("limit", "margin"), REASONS)
def test_every_kind_of_limit_accepts_and_rejects_and_says_why(base, limit, margin):
    rule = Criterion("accuracy", limit, margin)
    cells = [candidate("same", base), candidate("ruined", flipped(base, 700))]
    trial = Trial("t", cells, candidate("reference", base, 1.0), [rule], METRICS)
    found = judge([trial])["t"]
    assert [found[c.name].verdict for c in cells] == [ACCEPT, REJECT]
    assert found["same"].reasons[0].startswith(REASONS[limit, margin])
    assert ("floor 0.8" if limit == "floor" else "margin 2%") in found["same"].reasons[0]


def test_a_ceiling_of_a_resource_is_counted(base):
    rule = Criterion("weight_bytes", "ceiling", 300)
    cells = [candidate("small", base, 0.25), candidate("large", base, 0.5)]
    trial = Trial("t", cells, candidate("reference", base, 1.0), [rule], METRICS)
    found = judge([trial])["t"]
    assert [found[c.name].verdict for c in cells] == [ACCEPT, REJECT]
    assert "weight_bytes is 500: over 300" in found["large"].reasons


def test_a_reference_without_a_hit_leaves_a_ratio_undecided():
    """No share of nothing can be kept; the verdict is not an accident of a division."""
    none = outcomes(np.zeros(200, bool))
    metric = METRICS["accuracy"]
    contrast = metric.contrast(RELATIVE, 0.01)
    statistic = metric.statistic(none, none)
    found = metric.test.evidence([statistic], Against(statistic, Design(), contrast), 0.95)[0]
    assert found.p_accept >= 0.5
