"""Representativeness: does the calibration data look like the data that the model is judged on?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from halfstep.observation import Channels, Observation
from halfstep.sketch import BINS

GROUPS = 20
"""Groups of about equal mass that the distributions are compared over."""
PSI_SHIFTED = 0.25
"""The usual reading of the population stability index: below 0.1 stable, above 0.25 shifted."""
OUTSIDE = 0.001
"""Share of values outside the calibrated range that is worth a warning, with many values seen."""
BY_CHANCE = 10.0
"""Of n values from one distribution the next lies beyond the extremes with probability 2 / (n + 1);
a warning needs five times that."""
CHANNEL_SHIFTED = 0.5
"""A standardized mean difference that Cohen (1988) calls of medium size."""
CHANNEL_BY_CHANCE = 5.0
"""Standard errors of that difference which the largest of many channels may reach by chance."""
_FLOOR = 1e-6


@dataclass(frozen=True)
class Drift:
    """One site's activations on other data, beside those of calibration."""

    site: str
    outside: float
    """Share of values outside the calibrated extremes, to the resolution of the sketch."""
    allowed: float
    """The share outside that would be no surprise after as many values as were calibrated on."""
    excess: float
    """Largest magnitude over the largest calibrated one."""
    psi: float
    """Population stability index: ``sum (q - p) ln(q / p)`` over `GROUPS` groups of the calibrated
    distribution (p calibrated, q observed; shares floored at one in a million)."""
    channel_shift: float
    """Largest standardized mean difference (Cohen's d) of a channel, between the examples of both.
    It sees what the values taken together hide: features that only some kinds of example have."""
    allowed_channel_shift: float

    @property
    def worst(self) -> float:
        """The furthest that one of the three measures is beyond what is allowed."""
        return max(
            self.outside / self.allowed,
            self.psi / PSI_SHIFTED,
            self.channel_shift / self.allowed_channel_shift,
        )

    @property
    def shifted(self) -> bool:
        return self.worst > 1.0

    def __str__(self) -> str:
        told = []
        if self.outside > self.allowed:
            told.append(f"{self.outside:.2%} outside the calibrated range")
        if self.psi > PSI_SHIFTED:
            told.append(f"PSI {self.psi:.2f}")
        if self.channel_shift > self.allowed_channel_shift:
            told.append(f"a channel's mean moved by {self.channel_shift:.2f} standard deviations")
        return f"{self.site} ({', '.join(told)})" if told else self.site

    def to_json(self) -> dict[str, object]:
        return {
            "site": self.site,
            "outside_share": self.outside,
            "allowed_outside_share": self.allowed,
            "amax_over_calibrated": self.excess,
            "psi": self.psi,
            "channel_shift": self.channel_shift,
            "allowed_channel_shift": self.allowed_channel_shift,
            "shifted": self.shifted,
        }


def drift(site: str, calibration: Observation, selection: Observation) -> Drift:
    """Compares two observations of one site."""
    calibrated, observed = calibration.sketch, selection.sketch
    order = _by_value()
    p, q = calibrated.counts[order].astype(float), observed.counts[order].astype(float)
    used = np.flatnonzero(p)
    below, above = q[: used[0]].sum(), q[used[-1] + 1 :].sum()
    # The calibrated ends lie inside their bins: values of the same bin count as inside.
    outside = (below + above) / q.sum()
    reached = np.cumsum(p) / p.sum()
    group = np.minimum((np.concatenate([[0.0], reached[:-1]]) * GROUPS).astype(int), GROUPS - 1)
    shares = [
        np.maximum(np.bincount(group, weights=c, minlength=GROUPS) / c.sum(), _FLOOR)
        for c in (p, q)
    ]
    filled = np.bincount(group, weights=p, minlength=GROUPS) > 0
    filled[[0, -1]] = True
    psi = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0]))[filled].sum())
    largest, seen = calibrated.amax, observed.amax
    return Drift(
        site,
        outside=float(outside),
        allowed=max(OUTSIDE, BY_CHANCE / calibrated.total),
        excess=seen / largest if largest > 0 else float(seen > 0),
        psi=psi,
        channel_shift=_channel_shift(calibration.channels, selection.channels),
        allowed_channel_shift=_allowed_shift(calibration.channels, selection.channels),
    )


def _channel_shift(one: Channels | None, other: Channels | None) -> float:
    if one is None or other is None or len(one.mean) != len(other.mean):
        return 0.0
    spread = ((one.variance + other.variance) / 2).sqrt()
    difference = (one.mean - other.mean).abs()
    # Channels that never vary are judged by the range, not by a ratio of rounding errors.
    varies = spread > 1e-6 * (one.mean.abs() + other.mean.abs())
    if not bool(varies.any()):
        return 0.0
    return float((difference / spread.clamp(min=1e-300))[varies].max())


def _allowed_shift(one: Channels | None, other: Channels | None) -> float:
    if one is None or other is None:
        return CHANNEL_SHIFTED
    error = math.sqrt(1 / max(one.examples, 1) + 1 / max(other.examples, 1))
    return max(CHANNEL_SHIFTED, CHANNEL_BY_CHANCE * error)


def _by_value() -> np.ndarray:
    """The sketch's bins by rising value: negative ones from large to small, then positive."""
    half = BINS // 2
    return np.concatenate([np.arange(BINS - 1, half - 1, -1), np.arange(half)])


def drifts(
    calibrated: Mapping[str, Observation], observed: Mapping[str, Observation]
) -> tuple[Drift, ...]:
    """Every site that both saw, the most shifted first."""
    found = [
        drift(site, calibrated[site], observed[site])
        for site in calibrated
        if site in observed and observed[site].sketch.total > 0
    ]
    return tuple(sorted(found, key=lambda d: -d.worst))


def warning(found: tuple[Drift, ...], split: str) -> str | None:
    """One sentence that names the worst sites; None where the data looks alike everywhere."""
    shifted = [d for d in found if d.shifted]
    if not shifted:
        return None
    worst = "; ".join(str(d) for d in shifted[:3])
    return (
        f"calibration data does not represent {split}: {len(shifted)} of {len(found)} sites are "
        f"shifted, worst {worst}"
    )
