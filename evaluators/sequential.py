"""Evidence that may be looked at after every batch: e-processes against "the loss is too large".

An e-process starts at one and, whatever the truth, under its hypothesis exceeds ``1 / alpha`` at
any time with a probability of at most ``alpha`` (Ville 1939); so a cell may stop as soon as it
does, with no penalty for having looked before.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_ndtr, logsumexp

BETS = 2.0 ** -np.arange(0.25, 14, 0.5)
"""Shares of the largest stake that cannot go bankrupt, mixed evenly."""
ASYMPTOTIC_FROM = 200
"""Units before which a central limit theorem is not relied on."""


def betting(values: np.ndarray, counts: np.ndarray, limit: float, mean: float) -> float:
    """Natural logarithm of the capital won by betting that the mean is below ``mean``.

    Exact for independent values of at most ``limit``, of any distribution: a mixture of the
    capital processes of I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random
    variables by betting", Journal of the Royal Statistical Society B 86 (2024) 1-27. The stakes
    are fixed, so the order of the values does not matter.

    Args:
        values: float64 ``[k]``, each distinct one that was seen.
        counts: ``[k]``, how often.
    """
    if mean >= limit:  # a mean that no sample can have: the hypothesis is false from the start
        return math.inf if mean > limit else -math.inf
    stakes = BETS / (limit - mean)
    gains = np.log1p(np.maximum(stakes[:, None] * (mean - values), -1 + 1e-12))
    return float(logsumexp(gains @ counts) - math.log(len(stakes)))


def asymptotic(pseudo_values: np.ndarray, mean: float, planned: int, level: float) -> float:
    """Natural logarithm of an asymptotic e-process that their mean is below ``mean``.

    The one-sided normal mixture of I. Waudby-Smith, D. Arbour, R. Sinha, E. H. Kennedy and
    A. Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", Annals of
    Statistics 52 (2024) 2613-2640; its free parameter is set for half of the planned number.

    Args:
        pseudo_values: float64 ``[t]``, with the statistic as their mean: the observations for a
            mean, linearized for other aggregates.
    """
    t = len(pseudo_values)
    spread = float(pseudo_values.std())
    if t < ASYMPTOTIC_FROM or not spread > 0:
        return -math.inf
    total = t * (mean - float(pseudo_values.mean())) / spread
    wide = -2 * math.log(level)
    rho2 = (wide + math.log(wide + 1)) / (planned / 2)
    inside = t * rho2 + 1
    return float(
        math.log(2)
        - math.log(inside) / 2
        + rho2 * total**2 / (2 * inside)
        + log_ndtr(math.sqrt(rho2) * total / math.sqrt(inside))
    )


def p_value(log_capital: float) -> float:
    """Valid at any time: the inverse of the largest capital so far."""
    return math.exp(-max(log_capital, 0.0))
