"""How often synthetic sweeps accept what they should not, and what they should: ours beside two
habits.

    make bench-acceptance
    python -m benchmarks.acceptance [share of the sweeps] [outcomes …]

Each sweep has six cells. First all cells lose exactly the margin, so every
acceptance is false: the table gives the share of sweeps with at least one, which may not pass 5 %.
Then all cells are as good as the reference: the share of cells accepted is the power. "point" is
"the observed loss is below the margin"; "p > 0.05" is "a paired test finds no significant
difference, so it is fine".
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, ttest_rel

from evaluators import paired
from evaluators.acceptance import ACCEPT, Candidate, Trial, judge
from evaluators.criterion import Criterion
from evaluators.metric import CLUSTER, SCORED, Metric, Outcomes, Sums
from evaluators.statistics import f1, mean, one_hot
from evaluators.stopping import EARLY_SHARE, EXAMPLE, Stop, Watch, looks

CELLS = 6
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scenario:
    """A kind of outcome, its metric and how pairs are drawn."""

    name: str
    metric: Metric
    margin: float
    examples: int
    draw: Callable[[np.random.Generator, int], Columns]
    """A reference of so many examples."""
    change: Callable[[np.random.Generator, Columns, float], Columns]
    """From the reference and the true loss to a cell."""
    sweeps: int


def hits(generator: np.random.Generator, n: int) -> Columns:
    return {"x": (generator.random(n) < 0.85).astype(float)}


def flipped(generator: np.random.Generator, reference: Columns, loss: float) -> Columns:
    """2 % of answers turn, in the two directions so that the loss comes out."""
    x = reference["x"]
    lose, gain = (0.02 + loss) / 2 / 0.85, (0.02 - loss) / 2 / 0.15
    turned = generator.random(len(x)) < np.where(x > 0, lose, gain)
    return {"x": np.where(turned, 1 - x, x)}


def graded(generator: np.random.Generator, n: int) -> Columns:
    return {"x": generator.beta(4, 1.5, n)}


def dropped(generator: np.random.Generator, reference: Columns, loss: float) -> Columns:
    """Most queries stay as they are, a few lose all: the hard case for a bootstrap."""
    x = reference["x"]
    share = loss / float(4 / 5.5)
    noise = generator.normal(0, 0.01, len(x)) * (generator.random(len(x)) < 0.3)
    lost = generator.random(len(x)) < share
    return {"x": np.clip(np.where(lost, 0.0, x + noise), 0, 1)}


def losses(generator: np.random.Generator, n: int) -> Columns:
    return {"x": generator.lognormal(-1.5, 1.0, n)}


def raised(generator: np.random.Generator, reference: Columns, loss: float) -> Columns:
    """A skewed change of every example's loss."""
    change = generator.gamma(0.5, 2.0, len(reference["x"])) - 1.0
    return {"x": reference["x"] + 0.15 * change + loss}


def classes(generator: np.random.Generator, n: int) -> Columns:
    label = generator.integers(4, size=n)
    wrong = (label + generator.integers(1, 4, size=n)) % 4
    right = generator.random(n) < 0.85
    return {"label": label, "prediction": np.where(right, label, wrong)}


def confused(generator: np.random.Generator, reference: Columns, loss: float) -> Columns:
    """As `flipped`; errors fall on all classes alike, so macro-F1 loses what accuracy does."""
    label, before = reference["label"], reference["prediction"]
    n = len(label)
    right = before == label
    lose, gain = (0.04 + loss) / 2 / 0.85, (0.04 - loss) / 2 / 0.15
    turned = generator.random(n) < np.where(right, lose, gain)
    wrong = (label + generator.integers(1, 4, size=n)) % 4
    return {"label": label, "prediction": np.where(turned, np.where(right, wrong, label), before)}


def documents(generator: np.random.Generator, n: int) -> Columns:
    return hits(generator, n) | {CLUSTER: np.arange(n) // 5}


def documents_changed(generator: np.random.Generator, reference: Columns, loss: float) -> Columns:
    """Loss and noise are shared by the five examples of a document."""
    cluster = reference[CLUSTER]
    share = generator.normal(loss, 0.03, cluster.max() + 1)[cluster]
    return {"x": reference["x"] - share, CLUSTER: cluster}


def macro_f1(cell: Outcomes, _: Outcomes) -> Sums:
    label, predicted = one_hot(cell["label"], 4), one_hot(cell["prediction"], 4)
    features = np.concatenate([label * predicted, label + predicted], axis=1)
    return Sums(features, lambda sums: f1(*np.split(sums, 2, axis=-1)))


def value(cell: Outcomes, _: Outcomes) -> Sums:
    return mean(cell["x"])


SCENARIOS = (
    Scenario("binary", Metric("x", True, value, paired.binary), 0.01, 500, hits, flipped, 2000),
    Scenario("binary", Metric("x", True, value, paired.binary), 0.01, 4000, hits, flipped, 1000),
    Scenario("bounded", Metric("x", True, value, paired.bounded), 0.02, 500, graded, dropped, 1000),
    Scenario("unbounded", Metric("x", False, value, paired.bootstrap), 0.02, 500, losses, raised,
             1000),
    Scenario("aggregate", Metric("x", True, macro_f1, paired.bootstrap), 0.02, 500, classes,
             confused, 1000),
    Scenario("clustered", Metric("x", True, value, paired.bounded), 0.01, 500, documents,
             documents_changed, 1000),
)  # fmt: skip


def table(columns: Columns) -> Outcomes:
    size = len(next(iter(columns.values())))
    return Outcomes({**columns, SCORED: np.ones(size, bool)})


def verdicts(
    scenario: Scenario, reference: Outcomes, cells: list[Outcomes], stops: list[Stop | None] | None
) -> list[str]:
    """By the judge; with ``stops`` as early looks left the cells."""
    rule = criterion(scenario)
    share = EARLY_SHARE if stops is not None else 0.0
    candidates = [
        Candidate(str(i), cell, {}, stops[i] if stops else None) for i, cell in enumerate(cells)
    ]
    trial = Trial("t", candidates, Candidate("reference", reference, {}), [rule],
                  {"x": scenario.metric}, early_share=share)  # fmt: skip
    found = judge([trial])["t"]
    return [found[str(i)].verdict for i in range(len(cells))]


def criterion(scenario: Scenario) -> Criterion:
    limit = "max_drop" if scenario.metric.higher_is_better else "max_increase"
    return Criterion("x", limit, scenario.margin)


def watched(
    scenario: Scenario, reference: Outcomes, cell: Outcomes
) -> tuple[Outcomes, Stop | None]:
    watch = Watch([criterion(scenario)], {"x": scenario.metric}, reference, CELLS)
    seen = np.zeros(0, dtype=np.int64)
    parts = looks(len(reference), reference.clusters, 32)
    for part in parts[:-1]:
        seen = np.sort(np.r_[seen, part])
        some = cell.take(seen).beside({EXAMPLE: seen})
        stop = watch.look(some)
        if stop:
            return some, stop
    return cell, None


def insignificant(scenario: Scenario, reference: Outcomes, cell: Outcomes) -> bool:
    """What a reader of p-values would call fine: no significant difference, two-sided."""
    if "x" not in cell:
        ours = (cell["prediction"] == cell["label"]).astype(float)
        theirs = (reference["prediction"] == reference["label"]).astype(float)
    else:
        ours, theirs = cell["x"], reference["x"]
    if scenario.name in ("binary", "aggregate"):  # McNemar, exact
        less, more = int((ours < theirs).sum()), int((ours > theirs).sum())
        return less + more == 0 or bool(binomtest(less, less + more).pvalue > 0.05)
    return bool(ttest_rel(ours, theirs).pvalue > 0.05)


def simulate(scenario: Scenario, loss: float, sweeps: int) -> dict[str, np.ndarray]:
    """Accepted or not, by gate: ``[sweeps, cells]``; and the share of examples seen early."""
    generator = np.random.default_rng(11)
    gates: dict[str, list[list[float]]] = {
        g: [] for g in ("ours", "early", "point", "p > 0.05", "seen", "same")
    }
    for _ in range(sweeps):
        columns = scenario.draw(generator, scenario.examples)
        reference = table(columns)
        cells = [table(scenario.change(generator, columns, loss)) for _ in range(CELLS)]
        full = verdicts(scenario, reference, cells, None)
        looked = [watched(scenario, reference, cell) for cell in cells]
        early = verdicts(scenario, reference, [c for c, _ in looked], [s for _, s in looked])
        base = scenario.metric.value(reference, reference)
        observed = [scenario.metric.loss(scenario.metric.value(c, reference), base) for c in cells]
        gates["ours"].append([v == ACCEPT for v in full])
        gates["early"].append([v == ACCEPT for v in early])
        gates["point"].append([x < scenario.margin for x in observed])
        gates["p > 0.05"].append([insignificant(scenario, reference, c) for c in cells])
        gates["seen"].append([len(c) / scenario.examples for c, _ in looked])
        gates["same"].append([a == b for a, b in zip(full, early, strict=True)])
    return {name: np.array(rows, dtype=float) for name, rows in gates.items()}


def main(share: float, names: list[str]) -> None:
    print(
        f"{CELLS} cells, level 5 % for a sweep; share of sweeps with a false acceptance | share of "
        "good cells accepted"
    )
    print("| outcomes | examples | margin | sweeps | ours | ours, early | point | p > 0.05 |")
    print("|---|---|---|---|---|---|---|---|")
    for scenario in SCENARIOS:
        if names and scenario.name not in names:
            continue
        before, sweeps = time.perf_counter(), max(1, round(scenario.sweeps * share))
        null = simulate(scenario, scenario.margin, sweeps)
        good = simulate(scenario, 0.0, max(1, sweeps // 4))
        row = [
            f"{null[g].any(axis=1).mean():.1%} \\| {good[g].mean():.1%}"
            for g in ("ours", "early", "point", "p > 0.05")
        ]
        named = [scenario.name, f"{scenario.examples:,}", f"{scenario.margin:g}", f"{sweeps:,}"]
        print(f"| {' | '.join([*named, *row])} |", flush=True)
        print(
            f"{scenario.name}: {time.perf_counter() - before:.0f} s; early: "
            f"{good['seen'].mean():.0%} of examples seen of good cells, {null['seen'].mean():.0%} "
            f"at the margin; same verdict as on all: {good['same'].mean():.1%} and "
            f"{null['same'].mean():.1%}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0, sys.argv[2:])
