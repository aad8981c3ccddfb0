"""Calibrators: pure functions from observed values to the range that a format shall cover."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from halfstep.errors import UserError, allowed
from halfstep.formats import Format
from halfstep.observed import Observed

HISTOGRAM_BINS = 2048
ENTROPY_FIRST_CANDIDATE = 128
DEFAULT_PERCENTILE = 99.99
TIE = 1e-12
"""Divergences (nats) this close are equal: what separates them is the order of float sums."""
_CHUNK = 4_000_000  # elements of one temporary: bounds memory, not results


@dataclass(frozen=True, eq=False)
class Range:
    """Chosen ranges, one a block (float64), and what a reader must know about the choice."""

    lo: Tensor
    hi: Tensor
    notes: tuple[str, ...] = ()


Calibrator = Callable[[Observed, Format], Range]


def minmax(observed: Observed, fmt: Format) -> Range:
    """The true extremes: nothing is clipped."""
    return Range(*observed.extremes())


def percentile(observed: Observed, fmt: Format, *, share: float) -> Range:
    """Symmetric formats: the ``share`` quantile of |x|. Asymmetric: the pair of outer quantiles."""
    if fmt.symmetric:
        amax = observed.quantile(share, magnitude=True)
        lo, hi = -amax, amax
    else:
        lo = observed.quantile(1.0 - share, magnitude=False)
        hi = observed.quantile(share, magnitude=False)
    low, high = observed.extremes()
    lo, hi = torch.maximum(lo, low), torch.minimum(hi, high)
    vanished = int(((lo == 0) & (hi == 0) & ((low != 0) | (high != 0))).sum())
    notes = (f"percentile is zero in {vanished} block(s): minmax used there",) if vanished else ()
    empty = (lo == 0) & (hi == 0)
    return Range(torch.where(empty, low, lo), torch.where(empty, high, hi), notes)


def mse(observed: Observed, fmt: Format) -> Range:
    """The shrunken range with the least squared quantization error.

    The extremes are shrunk by factors 2**(-k/8), k = 0..96 (a geometric walk over 12 binades, so
    the bulk is reachable beside an outlier), then by 16 equal steps around the best. The error of a
    candidate is that of the format's own rounding on every value (or sketch point); of equal
    errors the larger range wins.
    """
    low, high = observed.extremes()
    values, weights = observed.points()
    coarse = torch.logspace(0, -12, 97, base=2.0, dtype=torch.float64)
    factor = _least_error(fmt, values, weights, low, high, coarse[:, None].expand(-1, len(low)))
    steps = torch.linspace(2**0.125, 2**-0.125, 17, dtype=torch.float64)
    fine = (factor * steps[:, None]).clamp(max=1.0)
    factor = _least_error(fmt, values, weights, low, high, fine)
    hit = int((factor <= 2.0**-12).sum())
    notes = (f"mse search ended at its smallest range in {hit} block(s)",) if hit else ()
    return Range(low * factor, high * factor, notes)


def _least_error(
    fmt: Format, values: Tensor, weights: Tensor, low: Tensor, high: Tensor, factors: Tensor
) -> Tensor:
    """For each block the factor (of ``[candidates, blocks]``) with the least error; first wins."""
    errors = torch.empty(factors.shape, dtype=torch.float64)
    chunk = max(1, _CHUNK // values.numel())
    for start in range(0, len(factors), chunk):
        part = factors[start : start + chunk]
        scale, zero_point = fmt.qparams(low * part, high * part)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny).float()[..., None]
        lower, upper = fmt.limits(zero_point[..., None])
        u = values * scale.reciprocal()
        error = fmt.round_(u, lower, upper).mul_(scale).sub_(values).square_()
        errors[start : start + chunk] = (error * weights).sum(dim=-1)
    return factors.gather(0, errors.argmin(dim=0, keepdim=True))[0]


def entropy(observed: Observed, fmt: Format) -> Range:
    """The range whose quantized histogram diverges least from the observed one (KL divergence).

    NVIDIA's algorithm as in pytorch-quantization's ``_compute_amax_entropy``: 2,048 bins of |x|,
    candidates 128, 129, … 2,048 bins, the tail added to a candidate's last bin, each level's mass
    spread over its non-empty bins, the last of equal minima taken. One departure: a candidate that
    keeps a single filled bin and cuts the rest is at divergence zero from itself, which on values
    of few levels (pixels) would win; it is passed over. Vectorised: per candidate only
    prefix sums at the borders of its levels are needed.
    """
    low, high = observed.extremes()
    edges = fmt.positive_edges(unsigned=bool((low >= 0).all()))
    amax = torch.maximum(low.abs(), high.abs())
    kept = [entropy_candidate(row, edges.numpy()) for row in observed.histogram(HISTOGRAM_BINS)]
    share = torch.tensor([k / HISTOGRAM_BINS for k in kept], dtype=torch.float64)
    clip = amax * share
    notes = []
    if observed.values_per_block < len(edges) - 1:
        notes.append(
            f"entropy saw {observed.values_per_block} values a block, fewer than its "
            f"{len(edges) - 1} levels"
        )
    whole = int((share == 1.0).sum())
    if whole:
        notes.append(f"entropy equals minmax in {whole} of {len(kept)} block(s)")
    return Range(torch.maximum(low, -clip), torch.minimum(high, clip), tuple(notes))


def entropy_candidate(histogram: np.ndarray, level_edges: np.ndarray) -> int:
    """How many leading bins of one histogram (float64 ``[bins]``) to keep.

    ``level_edges``: borders of the levels as fractions of a candidate's range, 0 to 1.
    """
    mass = histogram.astype(np.float64).copy()
    if mass[1:].sum() == 0:
        return len(mass)
    mass[0] = mass[1]  # zeros are exact at any scale: they must not decide
    candidates = np.arange(ENTROPY_FIRST_CANDIDATE, len(mass) + 1)
    prefix = np.concatenate([[0.0], np.cumsum(mass)])
    filled = np.concatenate([[0], np.cumsum(mass > 0)])
    safe_log = np.log(np.where(mass > 0, mass, 1.0))
    prefix_log = np.concatenate([[0.0], np.cumsum(mass * safe_log)])

    borders = np.ceil(level_edges[None, :] * candidates[:, None]).astype(np.int64)
    borders[:, -1] = candidates
    level_mass = np.diff(prefix[borders], axis=1)
    level_filled = np.diff(filled[borders], axis=1)
    tail = prefix[-1] - prefix[candidates]
    last = mass[candidates - 1]

    # KL(P||Q) = sum p log p - sum p log q, p over the kept bins with the tail in the last one.
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(level_mass > 0, level_mass / np.maximum(level_filled, 1), 1.0)
        cross = (level_mass * np.log(spread)).sum(axis=1)
        last_level = np.take_along_axis(
            spread, _level_of(borders, candidates - 1)[:, None], axis=1
        )[:, 0]
        own = prefix_log[candidates] - last * np.log(np.where(last > 0, last, 1.0))
        end = last + tail
        own += np.where(end > 0, end * np.log(np.where(end > 0, end, 1.0)), 0.0)
        cross += tail * np.log(last_level)
        kept_mass = prefix[candidates]
        total = prefix[-1]
        divergence = (own - cross) / total - np.log(total) + np.log(kept_mass)
    # A tail that lands on an empty bin has no counterpart in Q: infinitely far. A single filled bin
    # is at distance zero from itself whatever was cut away, so it proves nothing.
    useless = ((last == 0) & (tail > 0)) | ((filled[candidates] < 2) & (tail > 0))
    divergence = np.where(useless, np.inf, divergence)
    ties = np.flatnonzero(divergence <= divergence.min() + TIE)
    return int(candidates[ties[-1]])


def _level_of(borders: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Index of the level whose ``[border, next border)`` holds each candidate's position."""
    level: np.ndarray = (borders <= position[:, None]).sum(axis=1) - 1
    return level


CALIBRATORS: dict[str, Calibrator] = {
    "minmax": minmax,
    "percentile": partial(percentile, share=DEFAULT_PERCENTILE / 100),
    "entropy": entropy,
    "mse": mse,
}
"""Every calibrator by the name that configs use; ``percentile(99.9)`` names another share."""


def parse_calibrator(text: str) -> Calibrator:
    """Reads ``mse`` or ``percentile(99.9)``; raises UserError on anything else."""
    match = re.fullmatch(r"percentile\(([0-9.]+)\)", text)
    if match:
        share = float(match[1]) / 100
        if not 0.5 < share <= 1.0:
            raise UserError(f"calibrator {text!r}: a percentile lies above 50 and up to 100")
        return partial(percentile, share=share)
    if text not in CALIBRATORS:
        raise UserError(f"unknown calibrator {text!r}; {allowed(text, CALIBRATORS)}")
    return CALIBRATORS[text]
