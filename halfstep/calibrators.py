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
from halfstep.range_search import RangeSearch

HISTOGRAM_BINS = 2048
ENTROPY_FIRST_CANDIDATE = 128
DEFAULT_PERCENTILE = 99.99
DEFAULT_AVERAGING = 0.01
"""torch.ao's averaging constant."""
DEFAULT_POWER = 2.4
"""The norm that the published code of GPTQ searches its scales with."""
TIE = 1e-12
"""Divergences (nats) this close are equal: what separates them is the order of float sums."""


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
    if not fmt.symmetric:
        return percentile_pair(observed, fmt, low=1.0 - share, high=share)
    amax = observed.quantile(share, magnitude=True)
    return _within_extremes(observed, -amax, amax)


def percentile_pair(observed: Observed, fmt: Format, *, low: float, high: float) -> Range:
    """The quantiles ``low`` and ``high`` of x: another share may be cut on either side.

    A symmetric format covers the larger of the two magnitudes.
    """
    lo = observed.quantile(low, magnitude=False)
    return _within_extremes(observed, lo, observed.quantile(high, magnitude=False))


def _within_extremes(observed: Observed, lo: Tensor, hi: Tensor) -> Range:
    """The range, no wider than what was observed; where it is zero though not all values are, the
    extremes, and a note."""
    least, most = observed.extremes()
    lo, hi = torch.maximum(lo, least), torch.minimum(hi, most)
    empty = (lo == 0) & (hi == 0) & ((least != 0) | (most != 0))
    vanished = int(empty.sum())
    notes = (f"percentile is zero in {vanished} block(s): minmax used there",) if vanished else ()
    return Range(torch.where(empty, least, lo), torch.where(empty, most, hi), notes)


def moving_average(observed: Observed, fmt: Format, *, weight: float) -> Range:
    """The extremes of each batch, averaged exponentially: ``r += weight * (batch - r)``.

    As torch.ao's ``MovingAverageMinMaxObserver``; activations only. The average leans to the last
    batches, whose order halfstep fixes by the content of the examples.
    """
    ranges = observed.batch_ranges()
    lo, hi = ranges[0]
    for low, high in ranges[1:]:
        lo, hi = lo + weight * (low - lo), hi + weight * (high - hi)
    notes = ("moving average saw one batch: it equals minmax",) if len(ranges) == 1 else ()
    return Range(
        torch.tensor([lo], dtype=torch.float64), torch.tensor([hi], dtype=torch.float64), notes
    )


def mse(observed: Observed, fmt: Format) -> Range:
    """The shrunken range with the least squared quantization error (`least_error`, power 2)."""
    return least_error(observed, fmt, power=2.0)


def least_error(observed: Observed, fmt: Format, *, power: float) -> Range:
    """The shrunken range with the least sum of ``|error| ** power``.

    The extremes are shrunk by factors 2**(-k/8), k = 0..96 (a geometric walk over 12 binades, so
    the bulk is reachable beside an outlier), then by 16 equal steps around the best. The error of a
    candidate is that of the format's own rounding on every value (or sketch point); of equal
    errors the larger range wins. The walk ends where clipping alone costs more than the best.
    """
    low, high = observed.extremes()
    search = RangeSearch(fmt, power, *observed.points(), low, high)
    for binade in torch.split(torch.logspace(0, -12, 97, base=2.0, dtype=torch.float64), 8):
        if not search.could_still_win(binade[0]):
            break
        search.try_all(binade[:, None].expand(-1, len(low)))
    steps = torch.linspace(2**0.125, 2**-0.125, 17, dtype=torch.float64)
    fine = (search.factor * steps[:, None]).clamp(max=1.0)
    search = RangeSearch(fmt, power, *observed.points(), low, high)
    search.try_all(fine)
    hit = int((search.factor <= 2.0**-12).sum())
    notes = (f"search ended at its smallest range in {hit} block(s)",) if hit else ()
    return Range(low * search.factor, high * search.factor, notes)


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
    found = [entropy_candidate(row, edges.numpy()) for row in observed.histogram(HISTOGRAM_BINS)]
    kept = [candidate.bins for candidate in found]
    share = torch.tensor([k / HISTOGRAM_BINS for k in kept], dtype=torch.float64)
    clip = amax * share
    notes = []
    if observed.values_per_block < len(edges) - 1:
        notes.append(
            f"entropy saw {observed.values_per_block} values a block, fewer than its "
            f"{len(edges) - 1} levels"
        )
    alone = sum(kept_one.lonely for kept_one in found)
    if alone:
        notes.append(f"entropy had one candidate in {alone} of {len(kept)} block(s)")
    whole = int((share == 1.0).sum())
    if whole:
        notes.append(f"entropy equals minmax in {whole} of {len(kept)} block(s)")
    return Range(torch.maximum(low, -clip), torch.minimum(high, clip), tuple(notes))


@dataclass(frozen=True)
class Candidate:
    """The outcome of one entropy search."""

    bins: int
    """How many leading bins of the histogram to keep."""
    lonely: bool
    """True where no other candidate could have won."""


def entropy_candidate(histogram: np.ndarray, level_edges: np.ndarray) -> Candidate:
    """How many leading bins of one histogram (float64 ``[bins]``) to keep.

    ``level_edges``: borders of the levels as fractions of a candidate's range, 0 to 1.
    """
    mass = histogram.astype(np.float64).copy()
    if mass[1:].sum() == 0:
        return Candidate(len(mass), True)
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
    return Candidate(int(candidates[ties[-1]]), int(np.isfinite(divergence).sum()) == 1)


def _level_of(borders: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Index of the level whose ``[border, next border)`` holds each candidate's position."""
    level: np.ndarray = (borders <= position[:, None]).sum(axis=1) - 1
    return level


CALIBRATORS: dict[str, Calibrator] = {
    "minmax": minmax,
    "moving_average": partial(moving_average, weight=DEFAULT_AVERAGING),
    "percentile": partial(percentile, share=DEFAULT_PERCENTILE / 100),
    "entropy": entropy,
    "mse": mse,
    "sqnr": mse,
    "lp": partial(least_error, power=DEFAULT_POWER),
}
"""Every calibrator by the name that configs use. Some take parameters: ``percentile(99.9)``, or a
pair ``percentile(0.1, 99.9)``; ``moving_average(0.01)``; ``lp(2.4)``. ``sqnr`` and ``mse`` are one:
the signal does not depend on the range, so the least error has the highest SQNR."""
FOR_ACTIVATIONS_ONLY = ("moving_average",)


def parse_calibrator(text: str) -> Calibrator:
    """Reads ``mse``, ``percentile(99.9)`` and so on; raises UserError on anything else."""
    match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text.strip())
    name = match[1] if match else text
    if match is None or name not in CALIBRATORS:
        raise UserError(f"unknown calibrator {text!r}; {allowed(name, CALIBRATORS)}")
    if match[2] is None:
        return CALIBRATORS[name]
    try:
        numbers = [float(part) for part in match[2].split(",")]
    except ValueError:
        raise UserError(f"calibrator {text!r}: its parameters are numbers") from None
    if name == "percentile" and len(numbers) == 1:
        if not 50 < numbers[0] <= 100:
            raise UserError(f"calibrator {text!r}: a percentile lies above 50 and up to 100")
        return partial(percentile, share=numbers[0] / 100)
    if name == "percentile" and len(numbers) == 2:
        low, high = numbers
        if not 0 <= low < 50 < high <= 100:
            raise UserError(
                f"calibrator {text!r}: of a pair the first lies from 0 to below 50, the second "
                "above 50 and up to 100"
            )
        return partial(percentile_pair, low=low / 100, high=high / 100)
    if name == "moving_average" and len(numbers) == 1:
        if not 0 < numbers[0] <= 1:
            raise UserError(f"calibrator {text!r}: the weight of a batch is above 0 and up to 1")
        return partial(moving_average, weight=numbers[0])
    if name == "lp" and len(numbers) == 1:
        if not 0 < numbers[0] <= 10:
            raise UserError(f"calibrator {text!r}: the power is above 0 and up to 10")
        return partial(least_error, power=numbers[0])
    raise UserError(
        f"calibrator {text!r}: percentile takes one parameter or two, moving_average and lp take "
        "one, the others none"
    )
