"""What `plan` promises about a margin, against simulation and the tests themselves."""

import numpy as np
import pytest

from evaluators import paired
from evaluators.classification import METRICS
from evaluators.contrast import DIFFERENCE, Contrast
from evaluators.criterion import Criterion
from evaluators.metric import Against, Design
from evaluators.power import POWER, examples_for, flips_decidable, outlook, smallest_part
from evaluators.statistics import mean

MARGIN = Contrast(DIFFERENCE, 0.01, True)


def test_it_takes_a_little_more_than_the_textbook_says():
    """Which has 1,713 for 2 % flips: it leaves out that the test's variance is the hypothesis's."""
    assert 1713 < examples_for(0.02, MARGIN, 0.05) < 1713 * 1.2
    assert flips_decidable(examples_for(0.02, MARGIN, 0.05), MARGIN, 0.05) == pytest.approx(
        0.02, rel=1e-3
    )


@pytest.mark.parametrize("flips", [0.02, 0.05])
def test_so_many_examples_have_the_power_that_is_named(flips):
    contrast, level = Contrast(DIFFERENCE, 0.015, True), 0.05
    n, generator = examples_for(flips, contrast, level), np.random.default_rng(0)
    drawn = generator.multinomial(n, [0.85 - flips / 2, flips / 2, flips / 2, 0.15 - flips / 2],
                                  size=2000)  # fmt: skip
    accepted = [paired.Pairs(a, b, c, n).p_values(contrast)[0] <= level for a, b, c, _ in drawn]
    assert np.mean(accepted) == pytest.approx(POWER, abs=0.03)


@pytest.mark.parametrize(
    ("rule", "n"),
    [
        (Criterion("accuracy", "max_drop", 0.01), 400),
        (Criterion("accuracy", "floor", 0.99), 300),
        (Criterion("accuracy", "max_relative_drop", 0.01), 400),
    ],
)
def test_what_cannot_be_shown_is_said_and_true(rule, n):
    """With one example fewer than it takes not even a perfect cell passes; with those it does."""
    found = outlook(rule, METRICS["accuracy"], n, cells=24)
    assert not found.decidable
    takes = int(found.text.rsplit(" ", 1)[1].replace(",", ""))
    contrast = METRICS["accuracy"].contrast(rule.kind, rule.margin)
    for count, passes in ((takes, True), (takes - 3, False)):
        perfect = mean(np.ones(count))
        p = paired.binary.evidence([perfect], Against(perfect, Design(), contrast), 0.95)[
            0
        ].p_accept
        assert (p <= 0.05 / 24 + 1e-9) == passes
        assert outlook(rule, METRICS["accuracy"], count + 1, cells=24).decidable or not passes


def test_the_rarest_class_and_the_smallest_slice_decide():
    targets = np.repeat([0, 1, 2], [50, 20, 30])
    recall = Criterion("worst_class_recall", "max_drop", 0.05)
    assert smallest_part(recall, METRICS["worst_class_recall"], {}, targets) == 20
    by = Criterion("accuracy", "max_drop", 0.05, slice="site", min_examples=25)
    columns = {"site": np.repeat(["a", "b", "c"], [26, 24, 50])}
    assert smallest_part(by, METRICS["accuracy"], columns, targets) == 26
    assert "smallest slice by site" in outlook(by, METRICS["accuracy"], 100, 1, smallest=26).text


def test_where_the_spread_is_unknown_its_limit_is_named():
    found = outlook(Criterion("log_loss", "max_increase", 0.05), METRICS["log_loss"], 500, cells=1)
    assert "scatters by less than 0.38" in found.text
