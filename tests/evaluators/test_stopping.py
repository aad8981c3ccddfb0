"""Early looks: e-processes that keep their level however often one looks, and what a Watch does."""

import math

import numpy as np
import pytest
from judging import ACCURACY, SIZE, candidate, flipped, outcomes

from evaluators import paired, sequential
from evaluators.acceptance import ACCEPT, REJECT, Candidate, Trial, judge
from evaluators.classification import METRICS
from evaluators.contrast import ALONE, DIFFERENCE, RELATIVE, Contrast
from evaluators.criterion import Criterion
from evaluators.metric import CLUSTER, Against, Design
from evaluators.statistics import mean
from evaluators.stopping import EARLY_SHARE, EXAMPLE, Stop, Watch, looks


@pytest.mark.parametrize("mean_loss", [0.01, 0.05])
def test_betting_rarely_wins_where_the_loss_is_the_margin(mean_loss):
    """Looked at after every one of 400 examples, 1 run in 20 at most may ever pass 20."""
    generator, passed = np.random.default_rng(3), 0
    for _ in range(400):
        values = (generator.random(400) < mean_loss).astype(float)
        passed += any(
            sequential.betting(*np.unique(values[:t], return_counts=True), 1.0, mean_loss)
            >= math.log(20)
            for t in range(1, 401, 7)
        )
    assert passed / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_capital_is_a_mixture_of_products():
    values, limit, target = np.array([0.0, 1.0, -0.5, 0.0, 0.25]), 1.0, 0.3
    products = [
        np.prod(1 + stake / (limit - target) * (target - values)) for stake in sequential.BETS
    ]
    counted = np.unique(values, return_counts=True)
    found = sequential.betting(*counted, limit, target)
    assert found == pytest.approx(math.log(np.mean(products)))


def test_the_asymptotic_process_is_the_half_normal_mixture():
    """Against numeric integration of the capital over stakes."""
    values = np.random.default_rng(0).normal(0.1, 1.0, 500)
    target, planned, level = 0.25, 2000, 0.01
    wide = -2 * math.log(level)
    rho2 = (wide + math.log(wide + 1)) / (planned / 2)
    total = 500 * (target - values.mean()) / values.std()
    stakes = np.linspace(0, 12 * math.sqrt(rho2), 200_001)
    density = 2 * np.exp(-(stakes**2) / (2 * rho2)) / math.sqrt(2 * math.pi * rho2)
    capital = np.trapezoid(density * np.exp(stakes * total - 500 * stakes**2 / 2), stakes)
    found = sequential.asymptotic(values, target, planned, level)
    assert found == pytest.approx(math.log(capital), abs=1e-6)


def test_pseudo_values_of_a_mean_are_its_observations():
    """So the process of an aggregate of sums is that of the mean, where it is one."""
    generator = np.random.default_rng(5)
    theirs = generator.random(600)
    ours = theirs + 0.05 * generator.normal(size=600)
    contrast = Contrast(DIFFERENCE, 0.01, False)
    found = paired.bootstrap.capital(
        mean(ours), Against(mean(theirs), Design(), contrast), 2.0, 0.01
    )
    change = ours - theirs
    wanted = sequential.asymptotic(np.r_[change, change.max()], 0.01, 1200, 0.01)
    assert found[0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("size", [1, 31, 100, 1797])
def test_looks_see_each_example_once(size):
    parts = looks(size)
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    assert all(len(part) for part in parts)


def test_looks_fill_batches():
    sizes = [len(part) for part in looks(1000, step=64)]
    assert all(size % 64 == 0 for size in sizes[:-1])
    assert sizes[0] == 64


def test_looks_keep_clusters_whole():
    clusters = np.repeat(np.arange(40), 5)[np.random.default_rng(0).permutation(200)]
    seen = [set(clusters[part]) for part in looks(200, clusters)]
    assert len(seen) > 2
    assert sum(map(len, seen)) == 40


def watched(base, cell, criteria, cells=10, **options):
    watch = Watch(criteria, METRICS, outcomes(base), cells, **options)
    seen = np.zeros(0, dtype=int)
    for part in looks(len(base)):
        seen = np.sort(np.r_[seen, part])
        stop = watch.look(outcomes(cell).take(seen).beside({EXAMPLE: seen}))
        if stop:
            return stop
    return None


@pytest.fixture
def base():
    return np.random.default_rng(0).random(4000) < 0.9


def test_hopeless_and_perfect_cells_stop_and_doubtful_ones_do_not(base):
    ruined = base & (np.random.default_rng(1).random(4000) < 0.5)
    doubtful = flipped(base, 40)
    stops = [watched(base, cell, [ACCURACY]) for cell in (ruined, base, doubtful)]
    assert [stop and stop.verdict for stop in stops] == [REJECT, ACCEPT, None]
    assert stops[0].examples < 100 < stops[1].examples < 2500
    assert "accuracy certainly fails" in str(stops[0])


def test_a_cell_that_is_ruled_out_is_looked_at_once(base):
    stop = watched(base, base, [ACCURACY], ruled_out="too large")
    assert stop.examples <= 40
    assert stop.verdict == REJECT


@pytest.mark.parametrize("kind", [DIFFERENCE, RELATIVE, ALONE])
@pytest.mark.parametrize("higher", [True, False])
def test_what_early_looks_say_the_test_on_all_says_too(kind, higher):
    """Clear cases of every contrast, of metrics that are better high and low."""
    generator, n = np.random.default_rng(7), 3000
    theirs = (generator.random(n) < 0.6).astype(float)
    limit = 0.5 if kind == ALONE and higher else 0.7 if kind == ALONE else 0.05
    contrast = Contrast(kind, limit, higher)
    fine = theirs.copy()
    ruined = 1 - theirs if higher else np.ones(n)
    for cell, side in ((fine, 0), (ruined, 1)):
        for test in (paired.binary, paired.bounded):
            early = test.capital(mean(cell), Against(mean(theirs), Design(), contrast), 1.0, 0.01)
            whole = test.evidence([mean(cell)], Against(mean(theirs), Design(), contrast), 0.95)[0]
            assert early[side] > math.log(1e3)
            assert early[1 - side] < 0.1
            assert (whole.p_accept, whole.p_reject)[side] < 1e-3
            assert (whole.bound < contrast.margin) == (side == 0)


def test_verdicts_of_stopped_cells_stand_at_their_share_of_the_level(base):
    """The judge gives a stopped cell the verdict that it stopped with."""
    ruined = base & (np.random.default_rng(1).random(4000) < 0.5)
    cells = []
    for name, hits in (("fine", base), ("ruined", ruined)):
        stop = watched(base, hits, [ACCURACY], cells=3)
        seen = np.sort(np.concatenate(looks(4000)))[: stop.examples]
        partial = outcomes(hits).take(seen).beside({EXAMPLE: seen})
        cells.append(Candidate(name, partial, candidate("", base).resources, stop))
    cells.append(candidate("whole", base))
    trial = Trial("task", cells, candidate("reference", base, 1.0), [ACCURACY, SIZE], METRICS,
                  early_share=EARLY_SHARE)  # fmt: skip
    found = judge([trial])["task"]
    assert [found[c.name].verdict for c in cells] == [ACCEPT, REJECT, ACCEPT]
    assert "stopped at" in found["ruined"].reasons[0]


def test_a_stop_survives_its_record():
    stop = Stop(REJECT, 40, 500, "accuracy certainly fails", {"accuracy": (1.0, 1e-9)})
    assert Stop.from_json(stop.to_json()) == stop


def test_early_verdicts_err_no_more_than_their_share():
    """Cells exactly at the margin, 300 of them: at most a share of 1 % may ever be accepted."""
    generator, wrong, n = np.random.default_rng(9), 0, 1000
    criterion = Criterion("accuracy", "max_drop", 0.03)
    for _ in range(300):
        base = generator.random(n) < 0.9
        cell = base & ~(generator.random(n) < 0.03 / 0.9)
        stop = watched(base, cell, [criterion], cells=1)
        wrong += stop is not None and stop.verdict == ACCEPT
    assert wrong / 300 <= 0.05 * EARLY_SHARE + 3 * math.sqrt(0.01 / 300)


def test_clusters_go_to_the_asymptotic_process(base):
    clustered = outcomes(base).beside({CLUSTER: np.arange(4000) // 4})
    design = METRICS["accuracy"].design(clustered)
    statistic = METRICS["accuracy"].statistic(clustered, clustered)
    contrast = METRICS["accuracy"].contrast(DIFFERENCE, 0.01)
    found = paired.binary.capital(statistic, Against(statistic, design, contrast), 1.0, 0.01)
    assert found == paired.NOTHING  # no cluster differs: an asymptotic process cannot go by that
