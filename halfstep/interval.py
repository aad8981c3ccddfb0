"""A measured number and its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A value between bounds that each hold with a one-sided confidence of 95 %."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """Of what was counted."""
        return cls(value, value, value)

    @classmethod
    def from_json(cls, found: Mapping[str, float]) -> Interval:
        return cls(found["value"], found["low"], found["high"])

    def over(self, other: Interval) -> Interval:
        """The ratio of two positive numbers, as far apart as their bounds allow."""
        return Interval(self.value / other.value, self.low / other.high, self.high / other.low)

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}
