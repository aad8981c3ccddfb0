"""Paired bootstrap for metrics that are smooth functions of per-example sums.

A metric is given as features ``[n, k]`` of the examples and an aggregate from summed features to
a value. One set of resampling counts then serves every cell, and the jackknife is a subtraction,
so that a matrix of cells costs a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

Aggregate = Callable[[np.ndarray], np.ndarray]
"""From summed features ``[..., k]`` to values ``[...]``."""

RESAMPLES = 10_000
_CHUNK = 250
_SEED = 20260416


def resampling_counts(n: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each example occurs in each resample: chunks of ``[chunk, n]``, always the same."""
    generator = np.random.default_rng([_SEED, n])
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        drawn = generator.integers(n, size=(rows, n))
        drawn += np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


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

    def __neg__(self) -> Bootstrap:
        """The distribution of the negated difference."""
        return Bootstrap(-self.observed, -self.resampled[::-1], -self.bias, -self.acceleration)

    @property
    def degenerate(self) -> bool:
        """True where every resample gave the same: the bootstrap has nothing to go by."""
        return bool(self.resampled[0] == self.resampled[-1])

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


def paired_bootstrap(
    cells: list[np.ndarray],
    reference: np.ndarray,
    aggregate: Aggregate,
    resamples: int = RESAMPLES,
) -> list[Bootstrap]:
    """The distribution of ``aggregate(cell) - aggregate(reference)`` for each cell.

    Args:
        cells: features of each cell, float64 ``[n, k]``.
        reference: features of the reference, same shape.
    """
    base = np.empty((resamples, reference.shape[1]))
    shifts = [np.empty_like(base) for _ in cells]
    # A cell is the reference plus a difference that is zero in most rows where outcomes are
    # discrete: only the others need to be summed for each cell.
    changes = [cell - reference for cell in cells]
    rows = [np.flatnonzero(change.any(axis=1)) for change in changes]
    start = 0
    for counts in resampling_counts(len(reference), resamples):
        part = slice(start, start + len(counts))
        base[part] = counts @ reference
        for shift, change, used in zip(shifts, changes, rows, strict=True):
            sparse = 2 * len(used) < len(change)
            shift[part] = counts[:, used] @ change[used] if sparse else counts @ change
        start += len(counts)
    drawn_reference, total_reference = aggregate(base), aggregate(reference.sum(axis=0))
    without = aggregate(reference.sum(axis=0) - reference)
    result = []
    for cell, shift in zip(cells, shifts, strict=True):
        drawn = aggregate(base + shift) - drawn_reference
        jackknife = aggregate(cell.sum(axis=0) - cell) - without
        observed = float(aggregate(cell.sum(axis=0)) - total_reference)
        result.append(_bca(observed, np.sort(drawn), jackknife))
    return result


def _bca(observed: float, resampled: np.ndarray, jackknife: np.ndarray) -> Bootstrap:
    count = len(resampled)
    below = np.searchsorted(resampled, observed, side="left")
    equal = np.searchsorted(resampled, observed, side="right") - below
    share = np.clip((below + equal / 2) / count, 1 / (count + 1), count / (count + 1))
    deviation = jackknife.mean() - jackknife
    spread = float((deviation**2).sum()) ** 1.5
    acceleration = float((deviation**3).sum()) / (6 * spread) if spread > 0 else 0.0
    return Bootstrap(observed, resampled, float(norm.ppf(share)), acceleration)
