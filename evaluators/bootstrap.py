"""Paired bootstrap of any statistic, over examples or over the clusters that they come in.

One set of resampling counts serves every cell and the reference. Statistics of sums (`Sums`) cost a
matrix product for a whole matrix of cells, and their jackknife a subtraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from evaluators.metric import Design, Statistic, Sums

RESAMPLES = 10_000
FEWEST_RESAMPLES = 2_000
WORK = 2e8
"""Draws that one bootstrap may cost: large sets, of narrow intervals, take fewer resamples."""
WEIGHTED_WORK = 4e7
"""The same for statistics that sort: each draw costs more."""
JACKKNIFE_GROUPS = 400
"""Statistics that cannot subtract leave out groups of examples instead of each by itself."""
_CHUNK, _CHUNK_DRAWS = 250, 2**19
_SEED = 20260416


def resampling_counts(
    n: int, resamples: int = RESAMPLES, strata: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """How often each example occurs in each resample: chunks of ``[chunk, n]``, always the same.

    With ``strata`` as many are drawn of each kind as there are.
    """
    generator = np.random.default_rng([_SEED, n])
    kinds = [np.arange(n)] if strata is None else _groups(strata)
    chunk = int(np.clip(_CHUNK_DRAWS // max(n, 1), 1, _CHUNK))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        counts = np.zeros((rows, n))
        for kind in kinds:
            drawn = generator.integers(len(kind), size=(rows, len(kind)))
            drawn += np.arange(rows)[:, None] * len(kind)
            found = np.bincount(drawn.ravel(), minlength=rows * len(kind))
            counts[:, kind] = found.reshape(rows, len(kind))
        yield counts


def _groups(labels: np.ndarray) -> list[np.ndarray]:
    """The indices of each distinct label."""
    _, which = np.unique(labels, return_inverse=True)
    return [np.flatnonzero(which == i) for i in range(which.max() + 1)]


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """The bias-corrected and accelerated (BCa) distribution of a paired difference.

    Efron, "Better bootstrap confidence intervals", JASA 82 (1987) 171-185.
    """

    observed: float
    resampled: np.ndarray
    """Sorted differences, one a resample."""
    bias: float
    """z0: the median bias."""
    acceleration: float
    up: float = 0.0
    """By how much the one example, or cluster, that raises the difference most does so."""

    def __neg__(self) -> Bootstrap:
        """The distribution of the negated difference, without `up`."""
        return Bootstrap(-self.observed, -self.resampled[::-1], -self.bias, -self.acceleration)

    @property
    def degenerate(self) -> bool:
        """True where every resample gave the same, or no number: there is nothing to go by."""
        return bool(self.resampled[0] == self.resampled[-1]) or not np.isfinite(self.observed)

    def quantile(self, share: float) -> float:
        """The BCa confidence limit: one-sided, with ``share`` of confidence below it."""
        shifted = self.bias + float(norm.ppf(share))
        corrected = norm.cdf(self.bias + shifted / (1 - self.acceleration * shifted))
        return float(np.quantile(self.resampled, corrected))

    def p_above(self, value: float) -> float:
        """One-sided p-value against "the true difference is at least ``value``".

        The level at which the BCa upper limit just reaches ``value``: `quantile`, inverted.
        Not below ``1 / (resamples + 1)``: a bootstrap cannot resolve more.
        """
        count = len(self.resampled)
        share = np.searchsorted(self.resampled, value, side="left") / count
        share = float(np.clip(share, 1 / (count + 1), count / (count + 1)))
        w = float(norm.ppf(share)) - self.bias
        level = norm.cdf(w / (1 + self.acceleration * w) - self.bias)
        return float(np.clip(1 - level, 1 / (count + 1), 1.0))


Compared = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From values of a cell and of the reference, resample by resample, to what is looked at."""


def paired_bootstrap(
    cells: Sequence[Statistic],
    reference: Statistic,
    design: Design | None = None,
    compared: Compared = np.subtract,
    resamples: int | None = None,
) -> list[Bootstrap]:
    """The distribution of ``compared(cell, reference)`` for each cell, drawn as the design says.

    With clusters whole clusters are drawn (Davison and Hinkley, "Bootstrap Methods and their
    Application", 1997, section 3.8); strata then have no say.
    """
    design = design or Design()
    if isinstance(reference, Sums):
        sums = [cell for cell in cells if isinstance(cell, Sums)]
        assert len(sums) == len(cells)
        return _of_sums(sums, reference, design, compared, resamples)
    return _of_weights(cells, reference, design, compared, resamples)


def _resamples(units: int, work: float) -> int:
    return int(np.clip(work // units, FEWEST_RESAMPLES, RESAMPLES))


def _of_sums(
    cells: Sequence[Sums],
    reference: Sums,
    design: Design,
    compared: Compared,
    resamples: int | None,
) -> list[Bootstrap]:
    theirs = by_cluster(reference.features, design)
    # A cell is the reference plus a difference that is zero in most rows where outcomes are
    # discrete: only the others need to be summed for each cell.
    changes = [by_cluster(cell.features, design) - theirs for cell in cells]
    rows = [np.flatnonzero(change.any(axis=1)) for change in changes]
    units = len(theirs)
    resamples = resamples or _resamples(units, WORK)
    base = np.empty((resamples, theirs.shape[1]))
    shifts = [np.empty_like(base) for _ in cells]
    strata = design.strata if design.clusters is None else None
    start = 0
    for counts in resampling_counts(units, resamples, strata):
        part = slice(start, start + len(counts))
        base[part] = counts @ theirs
        for shift, change, used in zip(shifts, changes, rows, strict=True):
            sparse = 2 * len(used) < len(change)
            shift[part] = counts[:, used] @ change[used] if sparse else counts @ change
        start += len(counts)
    whole = theirs.sum(axis=0)
    result = []
    for cell, shift, change in zip(cells, shifts, changes, strict=True):
        drawn = compared(cell.aggregate(base + shift), reference.aggregate(base))
        ours = whole + change.sum(axis=0)
        jackknife = compared(
            cell.aggregate(ours - (theirs + change)), reference.aggregate(whole - theirs)
        )
        observed = float(compared(cell.aggregate(ours), reference.aggregate(whole)))
        result.append(_bca(observed, drawn, jackknife))
    return result


def by_cluster(features: np.ndarray, design: Design) -> np.ndarray:
    """Features summed over each cluster, in order of the clusters' names."""
    if design.clusters is None:
        return features
    names, which = np.unique(design.clusters, return_inverse=True)
    found = np.zeros((len(names), features.shape[1]))
    np.add.at(found, which, features)
    return found


def _of_weights(
    cells: Sequence[Statistic],
    reference: Statistic,
    design: Design,
    compared: Compared,
    resamples: int | None,
) -> list[Bootstrap]:
    n = len(reference)
    which = np.arange(n)
    if design.clusters is not None:
        which = np.unique(design.clusters, return_inverse=True)[1].reshape(-1)
    units = int(which.max()) + 1
    strata = design.strata if design.clusters is None else None
    drawn: list[list[np.ndarray]] = [[] for _ in cells]
    for counts in resampling_counts(units, resamples or _resamples(n, WEIGHTED_WORK), strata):
        spread = counts[:, which]
        theirs = reference.of(spread)
        for column, cell in zip(drawn, cells, strict=True):
            column.append(compared(cell.of(spread), theirs))
    groups = np.random.default_rng([_SEED, units, 1]).permutation(units) % JACKKNIFE_GROUPS
    left_out: list[list[np.ndarray]] = [[] for _ in cells]
    step = int(np.clip(_CHUNK_DRAWS // n, 1, JACKKNIFE_GROUPS))
    for start in range(0, min(units, JACKKNIFE_GROUPS), step):
        some = np.arange(start, min(start + step, units, JACKKNIFE_GROUPS))
        kept = (groups[which][None, :] != some[:, None]).astype(np.float64)
        theirs = reference.of(kept)
        for column, cell in zip(left_out, cells, strict=True):
            column.append(compared(cell.of(kept), theirs))
    ones = np.ones((1, n))
    base = reference.of(ones)
    return [
        _bca(float(compared(cell.of(ones), base)[0]), np.concatenate(d), np.concatenate(j))
        for cell, d, j in zip(cells, drawn, left_out, strict=True)
    ]


def _bca(observed: float, drawn: np.ndarray, jackknife: np.ndarray) -> Bootstrap:
    resampled = np.sort(drawn[np.isfinite(drawn)])  # a resample may hold none of some kind
    if len(resampled) == 0:
        return Bootstrap(observed, np.zeros(1), 0.0, 0.0)
    count = len(resampled)
    below = np.searchsorted(resampled, observed, side="left")
    equal = np.searchsorted(resampled, observed, side="right") - below
    share = np.clip((below + equal / 2) / count, 1 / (count + 1), count / (count + 1))
    jackknife = jackknife[np.isfinite(jackknife)]
    deviation = jackknife.mean() - jackknife
    spread = float((deviation**2).sum()) ** 1.5
    acceleration = float((deviation**3).sum()) / (6 * spread) if spread > 0 else 0.0
    up = float((observed - jackknife).max(initial=0.0))
    return Bootstrap(observed, resampled, float(norm.ppf(share)), acceleration, up)
