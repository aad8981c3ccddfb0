"""Acceptance: the three verdicts, Holm's correction, and what reasons must say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from evaluators.acceptance import (
    ACCEPT,
    INCONCLUSIVE,
    REJECT,
    Candidate,
    Criterion,
    holm,
    judge,
)
from evaluators.image_classification import METRICS, ClassificationOutcomes

ACCURACY = Criterion("accuracy", "max_drop", 0.01)
SIZE = Criterion("weight_bytes", "max_ratio", 0.5)


def outcomes(correct, classes=4):
    """Outcomes with given hits; labels go round the classes."""
    correct = np.asarray(correct, dtype=bool)
    label = np.arange(len(correct)) % classes
    best = np.where(correct, label, (label + 1) % classes)
    p = np.full((len(correct), classes), 0.1)
    p[np.arange(len(correct)), best] = 1 - 0.1 * (classes - 1)
    return ClassificationOutcomes(label, np.log(p))


def candidate(name, correct, size=0.25):
    resources = {"weight_bytes": size * 1000, "bit_operations": 1.0}
    return Candidate(name, outcomes(correct), resources)


def flipped(base, losses, gains=0):
    """``base`` with that many hits lost and misses gained."""
    changed = base.copy()
    changed[np.flatnonzero(base)[:losses]] = False
    changed[np.flatnonzero(~base)[:gains]] = True
    return changed


@pytest.fixture
def base():
    hits = np.ones(2000, dtype=bool)
    hits[np.random.default_rng(0).choice(2000, 300, replace=False)] = False
    return hits


def verdicts(base, cells, criteria):
    return judge(cells, candidate("reference", base, 1.0), criteria, METRICS)


def test_the_three_verdicts(base):
    cells = [
        candidate("same", base),
        candidate("ruined", flipped(base, 200)),
        candidate("close", flipped(base, 30, 15)),
    ]
    found = verdicts(base, cells, [ACCURACY])
    assert [found[c.name].verdict for c in cells] == [ACCEPT, REJECT, INCONCLUSIVE]
    assert "undecided, about" in found["close"].reasons[0]
    assert found["close"].findings[0].examples_needed > 2000


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_equals_statsmodels(p_values):
    ours = [min(c.ratio * 0.05, 1.0) for c in holm([p / 0.05 for p in p_values])]
    theirs = multipletests(p_values, method="holm")[1]
    assert np.allclose(ours, theirs)


def test_more_cells_make_acceptance_harder(base):
    borderline = flipped(base, 12, 4)
    alone = verdicts(base, [candidate("cell", borderline)], [ACCURACY])
    crowd = [candidate(f"cell{i}", borderline) for i in range(40)]
    crowded = verdicts(base, crowd, [ACCURACY])
    assert alone["cell"].verdict == ACCEPT
    assert {j.verdict for j in crowded.values()} == {INCONCLUSIVE}
    assert "not proven among 40 cells, about" in crowded["cell0"].reasons[0]


def test_cells_that_a_counted_criterion_rules_out_do_not_weigh_on_the_others(base):
    borderline = flipped(base, 12, 4)
    heavy = [candidate(f"heavy{i}", borderline, size=0.9) for i in range(40)]
    found = verdicts(base, [candidate("cell", borderline), *heavy], [ACCURACY, SIZE])
    assert found["cell"].verdict == ACCEPT
    assert found["heavy0"].verdict == REJECT
    assert found["heavy0"].reasons == ("weight_bytes is 0.900 of the reference: over 0.5",)


def test_every_criterion_must_be_shown(base):
    strict = Criterion("accuracy", "max_drop", 0.0001)
    found = verdicts(base, [candidate("cell", base)], [ACCURACY, strict])
    assert found["cell"].verdict == INCONCLUSIVE
    assert [f.verdict for f in found["cell"].findings] == [ACCEPT, INCONCLUSIVE]


def test_a_cell_with_unscored_examples_is_rejected(base):
    good = outcomes(base)
    log_p = good.log_probability.copy()
    log_p[:17] = np.nan
    broken = Candidate("nan", ClassificationOutcomes(good.label, log_p), {"weight_bytes": 1.0})
    found = verdicts(base, [broken, candidate("cell", base)], [ACCURACY])
    assert found["nan"].verdict == REJECT
    assert found["nan"].reasons[0].startswith("17 of 2000 examples could not be scored")
    assert found["cell"].verdict == ACCEPT


def test_worst_class_recall_needs_every_class(base):
    rule = Criterion("worst_class_recall", "max_drop", 0.05)
    one_class = base.copy()
    one_class[np.flatnonzero(base & (np.arange(2000) % 4 == 2))[:100]] = False
    cells = [candidate("same", base), candidate("hurt", one_class)]
    found = verdicts(base, cells, [rule])
    assert found["same"].verdict == ACCEPT
    assert found["hurt"].verdict == REJECT


def test_a_bootstrap_without_differences_is_inconclusive_and_says_why(base):
    rule = Criterion("macro_f1", "max_drop", 0.01)
    found = verdicts(base, [candidate("same", base)], [rule])
    assert found["same"].verdict == INCONCLUSIVE
    assert "no outcome differs" in found["same"].reasons[0]


def test_lower_is_better_metrics_lose_upwards(base):
    rule = Criterion("log_loss", "max_increase", 0.01)
    generator = np.random.default_rng(0)
    reference = outcomes(base)

    def shifted(by):
        log_p = reference.log_probability + generator.normal(
            0, 0.01, reference.log_probability.shape
        )
        return Candidate(str(by), ClassificationOutcomes(reference.label, log_p - by), {})

    cells = [shifted(0.0), shifted(0.05), shifted(-0.05)]
    found = judge(cells, Candidate("reference", reference, {}), [rule], METRICS)
    assert [found[c.name].verdict for c in cells] == [ACCEPT, REJECT, ACCEPT]


def test_false_acceptance_over_a_whole_matrix_stays_under_alpha():
    """Ten cells, all exactly one margin worse: the chance that any is accepted is at most 5 %."""
    generator = np.random.default_rng(7)
    base = np.ones(400, dtype=bool)
    accepted = 0
    for _ in range(150):
        cells = []
        for i in range(10):
            worse = base.copy()
            worse[generator.random(400) < 0.02] = False
            cells.append(candidate(f"c{i}", worse))
        rule = Criterion("accuracy", "max_drop", 0.02)
        found = verdicts(base, cells, [rule])
        accepted += any(j.verdict == ACCEPT for j in found.values())
    assert accepted / 150 <= 0.09
