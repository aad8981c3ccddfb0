"""Tango's score test and interval for the difference of two paired proportions.

T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
paired-sample design", Statistics in Medicine 17 (1998) 891-908.

Throughout, ``losses`` counts the pairs where the reference was right and the cell is wrong,
``gains`` the reverse, and the drop is ``(losses - gains) / n``.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import norm


def score(losses: float, gains: float, n: float, drop: float) -> float:
    """The score statistic for the hypothesis that the true drop is ``drop``.

    Standard normal under the hypothesis; negative where the observed drop is smaller. The nuisance
    proportion (gains) is at its restricted maximum likelihood: the root of
    ``2 n q**2 + w q - gains * drop * (1 - drop) = 0``, ``w = drop (2n - losses + gains) - losses -
    gains``, on the side where both discordant proportions are at least zero.
    """
    if n <= 0:
        raise ValueError("no pairs")
    w = drop * (2 * n - losses + gains) - losses - gains
    root = math.sqrt(max(w * w + 8 * n * gains * drop * (1 - drop), 0.0))
    q = max((root - w) / (4 * n), 0.0, -drop)
    variance = n * (2 * q + drop * (1 - drop))
    difference = losses - gains - n * drop
    if variance <= 0:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / math.sqrt(variance)


def noninferiority_p(losses: float, gains: float, n: float, margin: float) -> float:
    """One-sided p-value against "the true drop is at least ``margin``"."""
    return float(norm.cdf(score(losses, gains, n, margin)))


def inferiority_p(losses: float, gains: float, n: float, margin: float) -> float:
    """One-sided p-value against "the true drop is at most ``margin``"."""
    return float(norm.sf(score(losses, gains, n, margin)))


def upper_bound(losses: int, gains: int, n: int, confidence: float) -> float:
    """The largest drop that is compatible with the data at a one-sided confidence."""
    z = float(norm.ppf(confidence))
    return _solve(lambda drop: score(losses, gains, n, drop) + z, (losses - gains) / n, 1.0)


def lower_bound(losses: int, gains: int, n: int, confidence: float) -> float:
    """The smallest drop that is compatible with the data at a one-sided confidence."""
    return -upper_bound(gains, losses, n, confidence)


def _solve(function, start: float, end: float) -> float:  # type: ignore[no-untyped-def]
    edge = 1e-12
    low, high = max(start, -1 + edge), end - edge
    if function(high) >= 0:
        return end
    if function(low) <= 0:
        return start
    return float(brentq(function, low, high, xtol=1e-10))
