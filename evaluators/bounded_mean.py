"""Gaffke's test of a mean of values with a known upper limit: valid for few and for rare losses.

N. Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a
nonnegative variable", Mathematical Methods of Statistics 14 (2005) 451-467; also E. Learned-Miller
and P. S. Thomas, "A new confidence interval for the mean of a bounded random variable", 2020
(arXiv:1905.06208), which finds it nowhere to fail.

The observations are weighted by the gaps between uniform order statistics, one gap going to the
upper limit itself: a Bayesian bootstrap with one worst case added. For values of 0 and 1 that is
the exact test of Clopper and Pearson; where all values are equal it says what `n` examples without
a loss can say, where a bootstrap has nothing to go by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_CHUNK_DRAWS = 2**20
_SEED = 20260417


def _gaps(n: int) -> Iterator[np.ndarray]:
    """Weights in chunks of ``[r, n + 1]``, each row positive with sum one; always the same."""
    generator = np.random.default_rng([_SEED, n])
    chunk = max(1, min(RESAMPLES, _CHUNK_DRAWS // (n + 1)))
    for start in range(0, RESAMPLES, chunk):
        drawn = generator.standard_exponential((min(chunk, RESAMPLES - start), n + 1))
        yield drawn / drawn.sum(axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class BoundedMean:
    """What a sample says about the mean of what it was drawn from."""

    means: np.ndarray
    """Sorted: the upper confidence distribution of the mean."""

    def p_at_least(self, value: float) -> float:
        """One-sided p-value against "the mean is at least ``value``"."""
        count = len(self.means)
        above = count - int(np.searchsorted(self.means, value, side="left"))
        return (above + 1) / (count + 1)

    def upper(self, confidence: float) -> float:
        """The largest mean that is compatible with the sample at a one-sided confidence."""
        at = min(math.ceil(confidence * (len(self.means) + 1)), len(self.means)) - 1
        return float(self.means[at])


def bounded_means(samples: np.ndarray, limits: np.ndarray) -> list[BoundedMean]:
    """For several samples of one size at once.

    Args:
        samples: float64 ``[k, n]``.
        limits: ``[k]``, the largest value that each may take.
    """
    columns = np.concatenate([np.sort(samples, axis=1), limits[:, None]], axis=1).T
    drawn = np.concatenate([weights @ columns for weights in _gaps(samples.shape[1])])
    return [BoundedMean(np.sort(column)) for column in drawn.T]
