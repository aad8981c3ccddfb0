"""Latency: how queries are timed, which of the times count, and what they can support.

Candidates take turns query by query in one run, so that whatever slows the machine slows all of
them, and their ratio to the reference is paired.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from halfstep.interval import Interval

CONFIDENCE = 0.99
"""At which a percentile must be bounded before it is told."""
TOLD = 0.95
"""One-sided confidence of the bounds that are told with every number."""
PERCENTILES = (0.5, 0.9, 0.99, 0.999)
TRUNCATED = 0.5
"""The largest share of queries that may count as warm-up."""
MSER_BATCH = 5
SHIFTED = 0.05
"""A change of the median by less than this share is not worth a note."""


@lru_cache
def queries_needed(percentile: float, confidence: float = CONFIDENCE) -> int:
    """The fewest queries that bound a percentile from above with one of them beyond the bound.

    The smallest n with P(Binomial(n, 1 - q) <= 1) <= 1 - confidence, that is 64 for p90, 662 for
    p99 and 6,636 for p99.9 (the count of MLPerf's early stopping, one query over).

    >>> [queries_needed(q) for q in (0.9, 0.99, 0.999)]
    [64, 662, 6636]
    """
    n = 2
    step = 1
    while stats.binom.cdf(1, n, 1 - percentile) > 1 - confidence:
        step = max(1, n // 64)
        n += step
    while stats.binom.cdf(1, n - 1, 1 - percentile) <= 1 - confidence:
        n -= 1
    return n


def percentile_interval(times: np.ndarray, percentile: float) -> Interval | None:
    """A percentile between order statistics that hold it whatever the distribution (David and
    Nagaraja 2003, section 7.1); None where there are too few times for it."""
    n = len(times)
    if n < (queries_needed(percentile) if percentile > 0.5 else 2):
        return None
    ordered = np.sort(times)
    above = int(stats.binom.ppf(TOLD, n, percentile)) + 1
    below = int(stats.binom.ppf(1 - TOLD, n, percentile))
    at = max(math.ceil(n * percentile) - 1, 0)
    return Interval(
        float(ordered[at]), float(ordered[max(below - 1, 0)]), float(ordered[min(above, n) - 1])
    )


def warm_up(times: np.ndarray) -> int:
    """How many of the first times are warm-up: MSER-5 (White, Cobb and Spratt 2000).

    The truncation that makes the standard error of the rest's mean least, over means of five; at
    most half of the times.
    """
    batches = len(times) // MSER_BATCH
    if batches < 4:
        return 0
    means = times[: batches * MSER_BATCH].reshape(batches, MSER_BATCH).mean(1)
    # A pause of the machine is no warm-up: it shall not draw the truncation to itself.
    means = np.minimum(means, np.median(means) + 10 * stats.median_abs_deviation(means))
    limit = int(batches * TRUNCATED)
    errors = [means[d:].var() / (batches - d) for d in range(limit + 1)]
    return int(np.argmin(errors)) * MSER_BATCH


@dataclass(frozen=True)
class Shift:
    """Where the level of the times changes."""

    at: int
    share: float
    """By how much of the median before it."""
    p_value: float

    def to_json(self) -> dict[str, float]:
        return {"at": self.at, "share": self.share, "p_value": self.p_value}


def change_point(times: np.ndarray) -> Shift | None:
    """The change of level that Pettitt's rank test finds (Applied Statistics 28, 1979), if it is
    significant at 1 % and moves the median by at least 5 %: then there is no steady state."""
    n = len(times)
    if n < 20:
        return None
    ranks = stats.rankdata(times)
    steps = np.arange(1, n)
    u = 2 * np.cumsum(ranks)[:-1] - steps * (n + 1)
    at = int(np.argmax(np.abs(u))) + 1
    k = float(np.abs(u).max())
    p_value = min(1.0, 2 * math.exp(-6 * k**2 / (n**3 + n**2)))
    before, after = np.median(times[:at]), np.median(times[at:])
    share = float(after / before - 1)
    return Shift(at, share, p_value) if p_value <= 0.01 and abs(share) >= SHIFTED else None


def mean_interval(times: np.ndarray, batches: int = 20) -> Interval:
    """The mean by batch means: times that follow each other are not independent (Law 2015, section
    9.5)."""
    if len(times) < 2 * batches:
        batches = max(2, len(times) // 2)
    size = len(times) // batches
    means = times[len(times) - batches * size :].reshape(batches, size).mean(1)
    half = stats.t.ppf(TOLD, batches - 1) * means.std(ddof=1) / math.sqrt(batches)
    mean = float(times.mean())
    # One long pause makes Student's interval reach below every time that was seen.
    return Interval(mean, max(mean - float(half), float(times.min())), mean + float(half))


@dataclass(frozen=True, eq=False)
class Timed:
    """The times of one candidate at one batch size."""

    batch_size: int
    seconds: np.ndarray
    """All of them, warm-up included, in order."""
    dropped: int
    shift: Shift | None

    @property
    def steady(self) -> np.ndarray:
        return self.seconds[self.dropped :]

    def percentiles(self) -> dict[str, Interval]:
        """In milliseconds; those that the count supports."""
        found = {}
        for q in PERCENTILES:
            interval = percentile_interval(self.steady * 1e3, q)
            if interval is not None:
                found[f"p{q * 100:g}"] = interval
        return found

    @property
    def throughput(self) -> Interval:
        """Examples a second: one query after the other, as many at once as the batch holds."""
        mean = mean_interval(self.steady)
        n = self.batch_size
        return Interval(n / mean.value, n / mean.high, n / mean.low)


def ratio_interval(times: np.ndarray, reference: np.ndarray) -> Interval:
    """How many times as fast as the reference: the median over pairs that ran one after the
    other."""
    ratios = np.sort(reference / times)
    n = len(ratios)
    low = int(stats.binom.ppf(1 - TOLD, n, 0.5))
    high = int(stats.binom.ppf(TOLD, n, 0.5)) + 1
    return Interval(
        float(np.median(ratios)),
        float(ratios[max(low - 1, 0)]),
        float(ratios[min(high, n) - 1]),
    )


def time_in_turns(
    candidates: Mapping[str, Callable[[int], object]], queries: int
) -> dict[str, np.ndarray]:
    """Seconds of each query of each candidate, float64 ``[queries]``.

    In every round each candidate runs once, in an order that rotates, so that none always comes
    after the same one; the collector of garbage is off while they run. A candidate is called with
    the number of the round.
    """
    names = list(candidates)
    times = {name: np.empty(queries) for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for query in range(queries):
            shift = query % len(names)
            for name in names[shift:] + names[:shift]:
                started = time.perf_counter()
                candidates[name](query)
                times[name][query] = time.perf_counter() - started
    finally:
        if collecting:
            gc.enable()
    return times


EXTENSIONS = 4
"""How often queries are added for those that turned out to be warm-up."""


def time_steadily(
    candidates: Mapping[str, Callable[[int], object]], queries: int
) -> dict[str, np.ndarray]:
    """As `time_in_turns`, with more queries for those that are dropped as warm-up, so that as many
    are left as were asked for; at most `EXTENSIONS` times."""
    times = time_in_turns(candidates, queries)
    for _ in range(EXTENSIONS):
        left = min(len(own) - warm_up(own) for own in times.values())
        if left >= queries:
            break
        more = time_in_turns(candidates, queries - left)
        times = {name: np.concatenate([own, more[name]]) for name, own in times.items()}
    return times


def timed(seconds: Mapping[str, np.ndarray], batch_size: int) -> dict[str, Timed]:
    """With one warm-up for all, the longest: they ran in turns, and ratios pair them."""
    dropped = max(warm_up(own) for own in seconds.values())
    return {
        name: Timed(batch_size, own, dropped, change_point(own[dropped:]))
        for name, own in seconds.items()
    }


def notes(found: Mapping[str, Sequence[Timed]], queries: int) -> list[str]:
    """What a reader must know of the times.

    Args:
        found: of each contender, one a batch size, the single queries first.
        queries: how many single ones were asked for.
    """
    told = [
        f"{name}: {len(own[0].steady)} steady queries are too few for a p{100 * q:g}, which takes "
        f"{queries_needed(q)}"
        for name, own in found.items()
        for q in PERCENTILES[1:]
        if len(own[0].steady) < queries_needed(q) <= queries
    ]
    for sized in zip(*found.values(), strict=True):
        shifts = [t.shift for t in sized if t.shift is not None]
        if shifts:
            low, high = (f(s.share for s in shifts) for f in (min, max))
            first = min(s.at for s in shifts) + sized[0].dropped
            told.append(
                f"no steady state at batch {sized[0].batch_size}: the median of {len(shifts)} of "
                f"{len(sized)} contenders moves by {low:+.0%} to {high:+.0%} after query {first} "
                "(Pettitt's test); ratios pair queries that ran together"
            )
    return told
