"""Paired tests of a cell against the reference: which evidence a metric's outcomes can give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import norm

from evaluators import tango
from evaluators.bootstrap import Bootstrap, paired_bootstrap
from evaluators.metric import Design, Evidence, Metric, Statistic, Sums


def binary(
    metric: Metric,
    cells: Sequence[Statistic],
    reference: Statistic,
    design: Design,
    margin: float,
    confidence: float,
) -> list[Evidence]:
    """Tango's score test. Features: (hit, counts), where a hit is good or bad as the metric says;
    examples that do not count are in no pair. Clustered examples go to the bootstrap: pairs that
    hang together are not the independent ones of the test."""
    if design.clusters is not None:
        return bootstrap(metric, cells, reference, design, margin, confidence)
    theirs = _features(reference)
    counts = theirs[:, 1] > 0
    return [
        _tango(
            _pairs(_features(cell)[counts, 0], theirs[counts, 0], metric),
            len(reference),
            margin,
            confidence,
        )
        for cell in cells
    ]


def each_group(
    metric: Metric,
    cells: Sequence[Statistic],
    reference: Statistic,
    design: Design,
    margin: float,
    confidence: float,
) -> list[Evidence]:
    """For the smallest of several groups' rates. Features: hits by group, then membership.

    If no group's rate drops by more than the margin, their minimum does not either; so showing it
    for every group by Tango's test proves it for the minimum, with no correction (an
    intersection-union test; conservative). Harm is shown by the bootstrap of the minimum itself,
    for the cells where it could be: not where the loss was just shown to be below the margin.
    """
    if design.clusters is not None:
        return bootstrap(metric, cells, reference, design, margin, confidence)
    theirs, member = np.split(_features(reference), 2, axis=1)
    worst = []
    for cell in cells:
        hits, _ = np.split(_features(cell), 2, axis=1)
        tests = []
        for group in np.flatnonzero(member.any(axis=0)):
            inside = member[:, group] > 0
            pairs = _pairs(hits[inside, group], theirs[inside, group], metric)
            tests.append(_tango(pairs, len(reference), margin, confidence))
        deciding = max(tests, key=lambda test: test.p_accept)
        bound = max(test.bound for test in tests if test.bound is not None)
        note = "each class must pass by itself"
        worst.append(replace(deciding, bound=bound, p_reject=1.0, note=note))
    doubtful = [i for i, test in enumerate(worst) if test.p_accept > 1 - confidence]
    drawn = bootstrap(metric, [cells[i] for i in doubtful], reference, design, margin, confidence)
    for i, found in zip(doubtful, drawn, strict=True):
        worst[i] = replace(worst[i], p_reject=found.p_reject)
    return worst


def bootstrap(
    metric: Metric,
    cells: Sequence[Statistic],
    reference: Statistic,
    design: Design,
    margin: float,
    confidence: float,
) -> list[Evidence]:
    """Paired BCa bootstrap of any statistic. Says nothing where no outcome differs."""
    drawn = paired_bootstrap(cells, reference, design) if cells else []
    return [
        _from_bootstrap(
            -sample if metric.higher_is_better else sample, len(reference), margin, confidence
        )
        for sample in drawn
    ]


def _features(statistic: Statistic) -> np.ndarray:
    assert isinstance(statistic, Sums)
    return statistic.features


def _pairs(ours: np.ndarray, theirs: np.ndarray, metric: Metric) -> tuple[int, int, int]:
    """(losses, gains, pairs)."""
    less, more = int((ours < theirs).sum()), int((ours > theirs).sum())
    losses, gains = (less, more) if metric.higher_is_better else (more, less)
    return losses, gains, len(ours)


def _tango(
    pairs: tuple[int, int, int], examples: int, margin: float, confidence: float
) -> Evidence:
    def needed(level: float) -> int | None:
        count = tango.examples_needed(*pairs, margin, level)
        return None if count is None else math.ceil(count * examples / pairs[2])

    return Evidence(
        bound=tango.upper_bound(*pairs, confidence),
        p_accept=tango.noninferiority_p(*pairs, margin),
        p_reject=tango.inferiority_p(*pairs, margin),
        needed=needed,
    )


def _from_bootstrap(loss: Bootstrap, examples: int, margin: float, confidence: float) -> Evidence:
    if loss.degenerate:
        note = "no outcome differs from the reference, so the bootstrap has nothing to bound"
        return Evidence(None, 1.0, 1.0, lambda level: None, note)
    p_accept, p_reject = loss.p_above(margin), (-loss).p_above(-margin)

    def needed(level: float) -> int | None:
        p = min(p_accept, p_reject)
        if p >= 0.5:
            return None
        return math.ceil(examples * (float(norm.isf(level)) / float(norm.isf(p))) ** 2)

    return Evidence(loss.quantile(confidence), p_accept, p_reject, needed)
