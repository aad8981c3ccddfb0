"""Slow, obvious implementations that the vectorised ones must equal."""

from collections import Counter

import numpy as np
import torch
from scipy.stats import entropy as kl_divergence

from halfstep.qparams import choose_qparams
from halfstep.quantize import fake_quantize


def entropy_bins(histogram, levels, first=128):
    """NVIDIA's ``_compute_amax_entropy``, as its source reads, minus the in-place change of its
    input and the candidates that keep one filled bin and cut the rest."""
    bins = np.array(histogram, dtype=np.float64)
    bins[0] = bins[1]
    candidates, divergences = [], []
    for i in range(first, len(bins) + 1):
        space = np.linspace(0, i, num=levels + 1)
        digitized = np.digitize(range(i), space) - 1
        digitized[bins[:i] == 0] = -1
        mass = np.zeros(levels)
        for j, level in enumerate(digitized):
            if level != -1:
                mass[level] += bins[j]
        for level, count in Counter(digitized.tolist()).items():
            if level != -1:
                mass[level] /= count
        approximation = np.array([0.0 if level == -1 else mass[level] for level in digitized])
        observed = bins[:i].copy()
        observed[-1] += bins[i:].sum()
        if (bins[:i] > 0).sum() < 2 and bins[i:].sum() > 0:
            continue
        candidates.append(i)
        divergences.append(
            kl_divergence(observed / observed.sum(), approximation / approximation.sum())
        )
    best = min(divergences)
    return max(c for c, d in zip(candidates, divergences, strict=True) if d <= best + 1e-12)


def mse_range(values, weights, low, high, fmt):
    """Every candidate of the documented search, one after the other."""

    def error(factor):
        bounds = (torch.tensor([low * factor], dtype=torch.float64),
                  torch.tensor([high * factor], dtype=torch.float64))  # fmt: skip
        approximation = fake_quantize(values, choose_qparams(fmt, *bounds))
        return float(((approximation - values).square().double() * weights).sum())

    coarse = [2.0 ** (-k / 8) for k in range(97)]
    best = min(coarse, key=error)
    steps = torch.linspace(2**0.125, 2**-0.125, 17, dtype=torch.float64).tolist()
    best = min((min(best * step, 1.0) for step in steps), key=error)
    return low * best, high * best
