"""What a metric is: a pure aggregate over per-example outcomes, its direction, and its test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Outcomes(Protocol):
    """Per-example results of one model on one split, one row an example."""

    def __len__(self) -> int: ...

    @property
    def unscored(self) -> int:
        """How many examples gave no usable output (NaN or infinite)."""
        ...

    def columns(self) -> dict[str, np.ndarray]:
        """The table that is recorded: equal-length columns."""
        ...


@dataclass(frozen=True)
class Evidence:
    """What one paired test says about one cell's loss (how much worse than the reference)."""

    bound: float | None
    """Largest loss compatible with the data at the asked one-sided confidence."""
    p_accept: float
    """Against "the loss is at least the margin"."""
    p_reject: float
    """Against "the loss is at most the margin"."""
    needed: Callable[[float], int | None]
    """Examples that would decide at a one-sided level if the observed rates stay, or None."""
    note: str = ""


PairedTest = Callable[["Metric", Sequence[np.ndarray], np.ndarray, float, float], list[Evidence]]
"""(metric, features of each cell, features of the reference, margin, confidence) -> evidence."""


@dataclass(frozen=True)
class Metric:
    """A named aggregate over the outcomes of a cell beside those of the reference."""

    name: str
    higher_is_better: bool
    test: PairedTest | None
    """How a loss is tested against a margin; None: the metric is reported, not tested."""
    features: Callable[[Outcomes, Outcomes], np.ndarray]
    """float64 ``[n, k]`` from (cell, reference) outcomes."""
    aggregate: Callable[[np.ndarray], np.ndarray]
    """From features summed over examples, ``[..., k]``, to values ``[...]``."""

    def value(self, cell: Outcomes, reference: Outcomes) -> float:
        if len(cell) == 0:
            raise ValueError(f"{self.name} of no examples is not defined")
        return float(self.aggregate(self.features(cell, reference).sum(axis=0)))

    def loss(self, value: float, reference: float) -> float:
        """How much worse ``value`` is than the reference's: positive is worse."""
        return reference - value if self.higher_is_better else value - reference
