"""Cost: from a declared price list and measured throughput to money for a million inferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.latency import Timed
from halfstep.interval import Interval

MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """What an hour of the target costs, as declared."""

    per_hour: float
    """Of the device."""
    currency: str = "USD"
    watts: float | None = None
    """That the device draws under load, where energy is paid for by itself."""
    per_kwh: float = 0.0

    @property
    def hourly(self) -> float:
        return self.per_hour + (self.watts or 0.0) / 1000 * self.per_kwh


@dataclass(frozen=True)
class Cost:
    """Of a million inferences."""

    amount: Interval
    currency: str
    batch_size: int
    """The batch that has the most throughput of those within the latency objective."""

    def to_json(self) -> dict[str, object]:
        return {**self.amount.to_json(), "currency": self.currency, "batch_size": self.batch_size}


def cost(found: Sequence[Timed], prices: Prices, within_ms: float | None) -> Cost | None:
    """At the batch size with the most throughput whose p99 (or the highest percentile below it
    that the count supports) surely lies within the objective; None where none does.

    The bounds of the throughput become those of the cost.
    """
    usable = [t for t in found if within_ms is None or _worst(t) <= within_ms]
    if not usable:
        return None
    best = max(usable, key=lambda t: t.throughput.low)
    rate = best.throughput
    each = prices.hourly / 3600 * MILLION
    amount = Interval(each / rate.value, each / rate.high, each / rate.low)
    return Cost(amount, prices.currency, best.batch_size)


def _worst(timed: Timed) -> float:
    """The upper bound of the highest percentile up to p99, in milliseconds."""
    told = timed.percentiles()
    return next(told[name].high for name in ("p99", "p90", "p50") if name in told)
