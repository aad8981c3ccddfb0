"""Paired tests of a cell against the reference: which evidence a metric's outcomes can give.

A metric names one of `binary`, `bounded`, `bootstrap`, `each_group`, or a `Bootstrapped` that knows
how much one example can move it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta as beta_distribution
from scipy.stats import binom, norm

from evaluators import matched_ratio, sequential, tango
from evaluators.bootstrap import Bootstrap, by_cluster, paired_bootstrap
from evaluators.bounded_mean import bounded_means
from evaluators.contrast import ALONE, DIFFERENCE, RELATIVE, Contrast
from evaluators.metric import Against, Evidence, Statistic, Sums, undecided

MOST_FACTOR = 1e6
"""Past a million times the examples at hand, "more examples" is no answer."""
NOTHING = (-math.inf, -math.inf)
"""Capital where nothing can be said before all examples are seen."""


@dataclass(frozen=True)
class Bootstrapped:
    """Paired BCa bootstrap of any statistic, over examples or clusters, with one worst case added.

    Where no outcome differs from the reference's there is nothing to resample. If one example can
    move the statistic by a known amount, an exact bound is left: of ``n`` examples none of which
    differs, a share of differing ones of ``1 - alpha ** (1 / n)`` is the largest compatible.
    """

    span: float | None = None
    """The width of the range of the statistic's kernel; None where one example may do anything."""
    order: int = 1
    """How many examples the kernel takes: 1 of a mean, 2 of a comparison of pairs."""

    def evidence(
        self, cells: Sequence[Statistic], against: Against, confidence: float
    ) -> list[Evidence]:
        reference, contrast = against.reference, against.contrast
        drawn = paired_bootstrap(cells, reference, against.design, contrast.loss) if cells else []
        return [
            self._unmoved(cell, against, confidence)
            if sample.degenerate
            else _from_bootstrap(sample, len(reference), contrast.margin, confidence)
            for cell, sample in zip(cells, drawn, strict=True)
        ]

    def capital(
        self, cell: Statistic, against: Against, planned: float, level: float
    ) -> tuple[float, float]:
        """Asymptotic, for statistics of sums: their jackknife pseudo-values are what a mean's
        observations are."""
        reference, design, contrast = against.reference, against.design, against.contrast
        if not isinstance(cell, Sums) or not isinstance(reference, Sums):
            return NOTHING
        ours, theirs = by_cluster(cell.features, design), by_cluster(reference.features, design)
        all_ours, all_theirs, n = ours.sum(axis=0), theirs.sum(axis=0), len(ours)
        whole = contrast.loss(cell.aggregate(all_ours), reference.aggregate(all_theirs))
        left_out = contrast.loss(
            cell.aggregate(all_ours - ours), reference.aggregate(all_theirs - theirs)
        )
        values = n * whole - (n - 1) * left_out
        if not np.isfinite(values).all():
            return NOTHING
        # As in `_from_bootstrap`: one more like the worst, or the best, that was seen.
        worse, better = np.r_[values, values.max()], np.r_[values, values.min()]
        below = sequential.asymptotic(worse, contrast.margin, round(n * planned), level)
        above = sequential.asymptotic(-better, -contrast.margin, round(n * planned), level)
        return below, above

    def _unmoved(self, cell: Statistic, against: Against, confidence: float) -> Evidence:
        reference, design, contrast = against.reference, against.design, against.contrast
        ones = np.ones((1, len(reference)))
        ours, theirs = float(cell.of(ones)[0]), float(reference.of(ones)[0])
        if self.span is None or contrast.kind == ALONE or ours != theirs:
            what = "every resample gives the same" if ours != theirs else "no outcome differs"
            return undecided(f"{what}, so the bootstrap has nothing to bound")
        units = len(reference) // self.order
        if design.strata is not None and self.order == 2:
            units = int(np.unique(design.strata, return_counts=True)[1].min())
        if design.clusters is not None:
            units = len(np.unique(design.clusters)) // self.order
        span = self.span / (abs(theirs) if contrast.kind == RELATIVE else 1.0)
        share = min(contrast.margin / span, 1.0)

        def needed(level: float) -> int | None:
            if share <= 0:
                return None
            enough = math.log(level) / math.log1p(-share) if share < 1 else 1.0
            return math.ceil(enough / units * len(reference))

        bound = span * (1 - (1 - confidence) ** (1 / units))
        return Evidence(bound, (1 - share) ** units, 1.0, needed, "no outcome differs")


@dataclass(frozen=True)
class Bounded:
    """Means of values between 0 and 1: Gaffke's test, which needs no large sample and no regular
    distribution. Features: (value, counts); examples that do not count are in no pair. Clustered
    examples go to the bootstrap: what hangs together is not independent."""

    def evidence(
        self, cells: Sequence[Statistic], against: Against, confidence: float
    ) -> list[Evidence]:
        if against.design.clusters is not None:
            return CLUSTERED.evidence(cells, against, confidence)
        reference, contrast = against.reference, against.contrast
        every = [_losses(cell, reference, contrast) for cell in cells]
        sizes = {len(losses.values) for losses in every if losses is not None}
        found: dict[int, Evidence] = {}
        for size in sizes:  # one, but where cells differ in what they could not score
            own = [(i, x) for i, x in enumerate(every) if x is not None and len(x.values) == size]
            samples = [side for _, x in own for side in (x.values, -x.values)]
            limits = [side for _, x in own for side in (x.most, x.most_gain)]
            drawn = bounded_means(np.stack(samples), np.array(limits))
            for place, (i, losses) in enumerate(own):
                worse, better = drawn[2 * place : 2 * place + 2]
                p_accept = worse.p_at_least(losses.limit)
                p_reject = better.p_at_least(-losses.limit)
                found[i] = Evidence(
                    losses.as_loss(worse.upper(confidence), contrast),
                    p_accept,
                    p_reject,
                    _scaled(p_accept, p_reject, len(reference)),
                )
        return [found.get(i) or undecided("no example counts in both") for i in range(len(cells))]

    def capital(
        self, cell: Statistic, against: Against, planned: float, level: float
    ) -> tuple[float, float]:
        if against.design.clusters is not None:
            return CLUSTERED.capital(cell, against, planned, level)
        losses = _losses(cell, against.reference, against.contrast)
        return NOTHING if losses is None else (losses.below, losses.above)


@dataclass(frozen=True)
class Binary(Bounded):
    """Hits and misses, good or bad as the metric says: Tango's score test for a difference, Nam and
    Blackwelder's for a ratio, the exact binomial one for a floor or ceiling."""

    def evidence(
        self, cells: Sequence[Statistic], against: Against, confidence: float
    ) -> list[Evidence]:
        if against.design.clusters is not None:
            return CLUSTERED.evidence(cells, against, confidence)
        every = [Pairs.of(cell, against.reference) for cell in cells]
        return [
            _matched(pairs, against.contrast, confidence, len(against.reference))
            if pairs.n
            else undecided("no example counts in both")
            for pairs in every
        ]


@dataclass(frozen=True)
class EachGroup:
    """For the smallest of several groups' rates. Features: hits by group, then membership.

    If no group's rate loses more than the margin, their minimum does not either; so showing it for
    every group proves it for the minimum, with no correction (an intersection-union test;
    conservative). Harm is shown by the bootstrap of the minimum itself, for the cells where it
    could be: not where the loss was just shown to be below the margin.
    """

    def evidence(
        self, cells: Sequence[Statistic], against: Against, confidence: float
    ) -> list[Evidence]:
        if against.design.clusters is not None:
            return CLUSTERED.evidence(cells, against, confidence)
        reference, contrast = against.reference, against.contrast
        worst = []
        for cell in cells:
            tests = [
                _matched(Pairs.of(*group), contrast, confidence, len(reference))
                for group in _groups(cell, reference)
            ]
            deciding = max(tests, key=lambda test: test.p_accept)
            bound = max(test.bound for test in tests if test.bound is not None)
            note = "each class must pass by itself"
            worst.append(replace(deciding, bound=bound, p_reject=1.0, note=note))
        doubtful = [i for i, test in enumerate(worst) if test.p_accept > 1 - confidence]
        chosen = [cells[i] for i in doubtful]
        drawn = CLUSTERED.evidence(chosen, against, confidence)
        for i, found in zip(doubtful, drawn, strict=True):
            worst[i] = replace(worst[i], p_reject=found.p_reject)
        return worst

    def capital(
        self, cell: Statistic, against: Against, planned: float, level: float
    ) -> tuple[float, float]:
        if against.design.clusters is not None:
            return CLUSTERED.capital(cell, against, planned, level)
        groups = _groups(cell, against.reference)
        found = [_losses(*group, against.contrast) for group in groups]
        return min((losses.below for losses in found if losses), default=-math.inf), -math.inf


binary, bounded, bootstrap, each_group = Binary(), Bounded(), Bootstrapped(), EachGroup()
CLUSTERED = bootstrap


@dataclass(frozen=True)
class Pairs:
    """How often reference and cell hit: both, the reference alone, the cell alone, of ``n``."""

    both: float
    theirs: float
    ours: float
    n: float

    @classmethod
    def of(cls, cell: Statistic, reference: Statistic) -> Pairs:
        ours, theirs, counts = _counted(cell, reference)
        ours, theirs = ours[counts] > 0, theirs[counts] > 0
        return cls(
            int((ours & theirs).sum()),
            int((theirs & ~ours).sum()),
            int((ours & ~theirs).sum()),
            int(counts.sum()),
        )

    def times(self, factor: float) -> Pairs:
        return Pairs(*(factor * x for x in (self.both, self.theirs, self.ours, self.n)))

    def p_values(self, contrast: Contrast) -> tuple[float, float]:
        """Against "the loss is at least the margin", and at most."""
        up = contrast.higher_is_better
        if contrast.kind == DIFFERENCE:
            found = (self.theirs, self.ours) if up else (self.ours, self.theirs)
            return (
                tango.noninferiority_p(*found, self.n, contrast.limit),
                tango.inferiority_p(*found, self.n, contrast.limit),
            )
        if contrast.kind == RELATIVE:
            counts = (self.both, self.theirs, self.ours, self.n)
            ratio = 1 - contrast.sign * contrast.limit
            better = matched_ratio.noninferiority_p(*counts, ratio)
            worse = matched_ratio.inferiority_p(*counts, ratio)
            return (better, worse) if up else (worse, better)
        hits = self.both + self.ours
        at_least = float(binom.sf(round(hits) - 1, round(self.n), contrast.limit))
        at_most = float(binom.cdf(round(hits), round(self.n), contrast.limit))
        return (at_least, at_most) if up else (at_most, at_least)

    def bound(self, contrast: Contrast, confidence: float) -> float:
        """The largest loss that is compatible with the data."""
        up, n = contrast.higher_is_better, int(self.n)
        both, theirs, ours = int(self.both), int(self.theirs), int(self.ours)
        if contrast.kind == DIFFERENCE:
            found = (theirs, ours) if up else (ours, theirs)
            return tango.upper_bound(*found, n, confidence)
        if contrast.kind == RELATIVE:
            ratio = matched_ratio.bound(both, theirs, ours, n, confidence, lower=up)
            return contrast.sign * (1 - ratio)
        hits = both + ours  # Clopper and Pearson
        if up:
            rate = beta_distribution.ppf(1 - confidence, hits, n - hits + 1) if hits else 0.0
        else:
            rate = beta_distribution.ppf(confidence, hits + 1, n - hits) if hits < n else 1.0
        return float(contrast.loss(rate, 0.0))


def _matched(pairs: Pairs, contrast: Contrast, confidence: float, examples: int) -> Evidence:
    p_accept, p_reject = pairs.p_values(contrast)

    def needed(level: float) -> int | None:
        factor = decisive(lambda f: min(pairs.times(f).p_values(contrast)), level)
        return None if factor is None else math.ceil(factor * examples)

    return Evidence(pairs.bound(contrast, confidence), p_accept, p_reject, needed)


def decisive(p_at: Callable[[float], float], level: float) -> float | None:
    """How many times the examples at hand would decide, if the observed rates stay as they are.

    None where no number up to `MOST_FACTOR` does: the loss is as large as the margin.
    """
    if p_at(1.0) <= level:
        return 1.0
    if p_at(MOST_FACTOR) > level:
        return None
    return float(brentq(lambda f: p_at(f) - level, 1.0, MOST_FACTOR, rtol=1e-6))


@dataclass(frozen=True, eq=False)
class _Losses:
    """Losses as the linear form of a contrast, each between ``-most_gain`` and ``most``."""

    values: np.ndarray
    most: float
    most_gain: float
    limit: float
    """Their mean must stay below this."""
    scale: float

    @cached_property
    def _counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Each distinct value, and how often it is there."""
        return np.unique(self.values, return_counts=True)

    @property
    def below(self) -> float:
        """Capital won by betting that the mean is below the limit."""
        return sequential.betting(*self._counted, self.most, self.limit)

    @property
    def above(self) -> float:
        """The same of its being above."""
        values, counts = self._counted
        return sequential.betting(-values, counts, self.most_gain, -self.limit)

    def as_loss(self, mean: float, contrast: Contrast) -> float:
        """A mean of the linear form as a loss of the contrast's kind."""
        return contrast.margin + (mean - self.limit) / self.scale


def _losses(cell: Statistic, reference: Statistic, contrast: Contrast) -> _Losses | None:
    ours, theirs, counts = _counted(cell, reference)
    if not counts.any():
        return None
    ours, theirs = ours[counts], theirs[counts]
    base = float(theirs.mean())
    weight, limit = contrast.linear(base)
    scale = abs(base) if contrast.kind == RELATIVE and base else 1.0
    values = contrast.sign * (weight * theirs - ours)
    most, least = (weight, -1.0) if contrast.higher_is_better else (1.0, -weight)
    return _Losses(values, most, -least, limit, scale)


def _counted(cell: Statistic, reference: Statistic) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of cell and reference, and which examples count in both."""
    assert isinstance(cell, Sums)
    assert isinstance(reference, Sums)
    counts = (cell.features[:, 1] > 0) & (reference.features[:, 1] > 0)
    return cell.features[:, 0], reference.features[:, 0], counts


def _groups(cell: Statistic, reference: Statistic) -> list[tuple[Sums, Sums]]:
    """Cell and reference for each group that has members."""
    assert isinstance(cell, Sums)
    assert isinstance(reference, Sums)
    ours, member = np.split(cell.features, 2, axis=1)
    theirs, _ = np.split(reference.features, 2, axis=1)
    return [
        (
            Sums(np.stack([ours[:, g], member[:, g]], axis=1), cell.aggregate),
            Sums(np.stack([theirs[:, g], member[:, g]], axis=1), reference.aggregate),
        )
        for g in np.flatnonzero(member.any(axis=0))
    ]


def _from_bootstrap(loss: Bootstrap, examples: int, margin: float, confidence: float) -> Evidence:
    """For acceptance as if one more example were there, as bad as the worst that was seen: where
    few examples make up the whole loss, chance had it that there were not more."""
    p_accept = loss.p_above(margin - loss.up)
    p_reject = (-loss).p_above(-margin)
    bound = loss.quantile(confidence) + loss.up
    return Evidence(bound, p_accept, p_reject, _scaled(p_accept, p_reject, examples))


def _scaled(p_accept: float, p_reject: float, examples: int) -> Callable[[float], int | None]:
    """Examples that would decide if the smaller p-value's normal score grows as their root."""

    def needed(level: float) -> int | None:
        p = min(p_accept, p_reject)
        if p >= 0.5:
            return None
        return math.ceil(examples * (float(norm.isf(level)) / float(norm.isf(p))) ** 2)

    return needed
