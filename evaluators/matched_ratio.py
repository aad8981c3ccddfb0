"""Score test and interval for the ratio of two paired proportions.

J. Nam and W. C. Blackwelder, "Analysis of the ratio of marginal probabilities in a matched-pair
setting", Statistics in Medicine 21 (2002) 689-699.

Throughout, of ``n`` pairs ``both`` are hits of reference and cell, ``losses`` of the reference
alone, ``gains`` of the cell alone; the ratio is ``(both + gains) / (both + losses)``.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import norm


def score(both: float, losses: float, gains: float, n: float, ratio: float) -> float:
    """The score statistic for the hypothesis that the true ratio is ``ratio``.

    Standard normal under the hypothesis; positive where the cell does better. Under it a pair's
    ``cell - ratio * reference`` has the variance ``ratio (p_gain + p_loss)``. The nuisance
    proportions are at their restricted maximum likelihood, the positive root of a quadratic.
    """
    if n <= 0:
        raise ValueError("no pairs")
    if ratio > 1:  # the same hypothesis with the two in each other's place, where the root is the
        return -score(both, gains, losses, n, 1 / ratio)  # positive one
    theirs, ours, known = both + losses, both + gains, both + losses + gains
    difference = ours - ratio * theirs
    k = ratio**2 * (theirs + 2 * gains) - ours
    root = math.sqrt(max(k * k + 4 * ratio**2 * (1 - ratio**2) * known * gains, 0.0))
    gain = max((k + root) / (2 * ratio * (1 + ratio) * n), 0.0)
    loss = ratio * gain + (1 - ratio) * known / n
    variance = n * ratio * (gain + loss)
    if variance <= 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / math.sqrt(variance)


def noninferiority_p(both: float, losses: float, gains: float, n: float, ratio: float) -> float:
    """One-sided p-value against "the true ratio is at most ``ratio``"."""
    return float(norm.sf(score(both, losses, gains, n, ratio)))


def inferiority_p(both: float, losses: float, gains: float, n: float, ratio: float) -> float:
    """One-sided p-value against "the true ratio is at least ``ratio``"."""
    return float(norm.cdf(score(both, losses, gains, n, ratio)))


def bound(both: int, losses: int, gains: int, n: int, confidence: float, *, lower: bool) -> float:
    """The smallest, or largest, ratio that is compatible with the data at a one-sided confidence.

    Infinite where the reference has no hit.
    """
    if both + losses == 0:
        return math.inf
    z = float(norm.ppf(confidence)) * (1 if lower else -1)
    observed = (both + gains) / (both + losses)
    ends = (1e-9, max(observed, 1e-9)) if lower else (max(observed, 1e-9), 1e9)
    low, high = (score(both, losses, gains, n, end) - z for end in ends)
    if low * high >= 0:
        return ends[0] if lower else ends[1]
    return float(brentq(lambda ratio: score(both, losses, gains, n, ratio) - z, *ends, xtol=1e-12))
