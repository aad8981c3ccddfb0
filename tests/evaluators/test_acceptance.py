"""Acceptance: the three verdicts, Holm's correction, and what reasons must say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import ACCURACY, SIZE, candidate, flipped, outcomes
from statsmodels.stats.multitest import multipletests

from evaluators import classification
from evaluators.acceptance import (
    ACCEPT,
    INCONCLUSIVE,
    REJECT,
    Candidate,
    Trial,
    holm,
    judge,
    overall,
)
from evaluators.classification import METRICS
from evaluators.criterion import Criterion
from evaluators.metric import CLUSTER, SLICE


@pytest.fixture
def base():
    hits = np.ones(2000, dtype=bool)
    hits[np.random.default_rng(0).choice(2000, 300, replace=False)] = False
    return hits


def verdicts(base, cells, criteria):
    return judge([Trial("task", cells, candidate("reference", base, 1.0), criteria, METRICS)])[
        "task"
    ]


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
    log_p = good["log_p"].copy()
    log_p[:17] = np.nan
    broken = Candidate("nan", classification.outcomes(good["label"], log_p), {"weight_bytes": 1.0})
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
        log_p = reference["log_p"] + generator.normal(0, 0.01, reference["log_p"].shape)
        return Candidate(str(by), classification.outcomes(reference["label"], log_p - by), {})

    cells = [shifted(0.0), shifted(0.05), shifted(-0.05)]
    trial = Trial("task", cells, Candidate("reference", reference, {}), [rule], METRICS)
    found = judge([trial])["task"]
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


def sliced(name, correct, column, clusters=None):
    columns = {SLICE + "lang": column} | ({CLUSTER: clusters} if clusters is not None else {})
    return Candidate(name, outcomes(correct).beside(columns), {})


def test_every_slice_must_pass_and_the_worst_is_named(base):
    lang = np.where(np.arange(2000) % 5 == 0, "de", "en")
    lang[:10] = "nl"
    rule = Criterion("accuracy", "max_drop", 0.03, slice="lang", min_examples=100)
    hurt = base.copy()
    hurt[np.flatnonzero(base & (lang == "de"))[:60]] = False
    cells = [sliced("same", base, lang), sliced("hurt", hurt, lang)]
    found = judge([Trial("t", cells, sliced("reference", base, lang), [rule], METRICS)])["t"]
    assert found["same"].verdict == ACCEPT
    assert found["hurt"].verdict == REJECT
    assert "where lang is de (398 examples, the worst of 2 slices)" in found["hurt"].reasons[0]
    parts = found["hurt"].findings[0].slices
    assert [part.value for part in parts] == ["de", "en"]  # ten examples of nl are too few
    whole = Criterion("accuracy", "max_drop", 0.06)
    assert verdicts(base, [candidate("hurt", hurt)], [whole])["hurt"].verdict == ACCEPT


def test_harm_in_one_of_many_slices_is_corrected_for_their_number(base):
    column = (np.arange(2000) % 20).astype(str)
    rule = Criterion("accuracy", "max_drop", 0.03, slice="c")
    hurt = base.copy()
    hurt[np.flatnonzero(base & (column == "7"))[:12]] = False
    alone = Criterion("accuracy", "max_drop", 0.03)

    def cell(name, correct):
        return Candidate(name, outcomes(correct).beside({SLICE + "c": column}), {})

    found = judge([Trial("t", [cell("hurt", hurt)], cell("r", base), [rule], METRICS)])["t"]["hurt"]
    worst = found.findings[0].slices[0]
    inside = np.flatnonzero(column == "7")
    only = judge(
        [
            Trial(
                "t",
                [candidate("hurt", hurt[inside])],
                candidate("r", base[inside]),
                [alone],
                METRICS,
            )
        ]
    )["t"]["hurt"]
    assert worst.p_reject == pytest.approx(min(1, 20 * only.findings[0].evidence.p_reject))


def test_clusters_make_the_same_drop_harder_to_certify(base):
    """Twenty hits lost one each in twenty documents, or all in one."""
    lost = flipped(base, 20)
    rule = Criterion("accuracy", "max_drop", 0.02)
    by_ten = np.repeat(np.arange(200), 10).astype(str)

    def bound(correct):
        cells = [sliced("cell", correct, by_ten, by_ten)]
        reference = sliced("reference", base, by_ten, by_ten)
        return judge([Trial("t", cells, reference, [rule], METRICS)])["t"]["cell"].findings[0]

    spread = base.copy()
    for document in range(20):
        spread[np.flatnonzero(base & (by_ten == str(document * 10)))[:1]] = False
    assert spread.sum() == lost.sum()
    assert bound(lost).evidence.bound > 1.3 * bound(spread).evidence.bound


def test_cells_of_all_tasks_are_weighed_against_each_other(base):
    borderline = flipped(base, 12, 4)
    trials = [
        Trial(
            f"t{i}", [candidate("cell", borderline)], candidate("r", base, 1.0), [ACCURACY], METRICS
        )
        for i in range(40)
    ]
    assert judge(trials[:1])["t0"]["cell"].verdict == ACCEPT
    assert {found["cell"].verdict for found in judge(trials).values()} == {INCONCLUSIVE}


def test_what_fails_one_task_fails():
    assert overall([ACCEPT, ACCEPT]) == ACCEPT
    assert overall([ACCEPT, INCONCLUSIVE]) == INCONCLUSIVE
    assert overall([INCONCLUSIVE, REJECT, ACCEPT]) == REJECT


def test_a_share_of_unscored_examples_may_be_allowed(base):
    good = outcomes(base)
    log_p = good["log_p"].copy()
    log_p[:3] = np.nan
    cells = [Candidate("nan", classification.outcomes(good["label"], log_p), {})]
    rule = Criterion("accuracy", "max_drop", 0.02)
    for limit, wanted in ((0.0, REJECT), (0.01, ACCEPT)):
        trial = Trial("t", cells, Candidate("r", good, {}), [rule], METRICS, limit)
        assert judge([trial])["t"]["nan"].verdict == wanted
