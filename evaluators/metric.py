"""What a metric is: a pure aggregate over per-example outcomes, its direction, and its test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from evaluators.contrast import Contrast

CLUSTER = "cluster"
"""The column that names what examples come in groups of: documents, queries, users."""
SLICE = "slice."
"""Before the name of a column whose values are slices."""
SCORED = "scored"
"""The column that is False where a model gave no usable output (NaN or infinite)."""


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Per-example results of one model on one split: a table with one row an example."""

    columns: Mapping[str, np.ndarray]
    """Arrays ``[examples, …]``; always among them `SCORED`, bool."""

    def __len__(self) -> int:
        return len(self.columns[SCORED])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @cached_property
    def unscored(self) -> int:
        """How many examples gave no usable output."""
        return int((~self.columns[SCORED]).sum())

    @property
    def clusters(self) -> np.ndarray | None:
        return self.columns.get(CLUSTER)

    def take(self, which: np.ndarray) -> Outcomes:
        """Some examples."""
        return Outcomes({name: values[which] for name, values in self.columns.items()})

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """One table under the other. Where later axes differ (lengths) the rest is filled, with NaN
        or -1 as `blank` does."""
        return cls({name: _stacked([part[name] for part in parts]) for name in parts[0].columns})

    def beside(self, columns: Mapping[str, np.ndarray]) -> Outcomes:
        """The table with more columns."""
        return Outcomes({**self.columns, **columns})


def blank(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A table to be filled: NaN where numbers are held, -1 for whole numbers, else zero."""
    filler = np.nan if dtype.kind == "f" else -1 if dtype.kind == "i" else 0
    return np.full(shape, filler, dtype)


def _stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    inner = tuple(max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True))
    if all(part.shape[1:] == inner for part in parts):
        return np.concatenate(parts)
    table = blank((sum(map(len, parts)), *inner), parts[0].dtype)
    start = 0
    for part in parts:
        table[start : start + len(part), *(slice(s) for s in part.shape[1:])] = part
        start += len(part)
    return table


Aggregate = Callable[[np.ndarray], np.ndarray]
"""From summed features ``[..., k]`` to values ``[...]``."""


@dataclass(frozen=True, eq=False)
class Sums:
    """A statistic of sums over examples: resampling it is one matrix product."""

    features: np.ndarray
    """float64 ``[n, k]``."""
    aggregate: Aggregate

    def __len__(self) -> int:
        return len(self.features)

    def of(self, counts: np.ndarray) -> np.ndarray:
        """Its values where example i counts ``counts[:, i]`` times: ``[r, n]`` to ``[r]``."""
        return self.aggregate(counts @ self.features)


@dataclass(frozen=True, eq=False)
class Weighted:
    """A statistic that needs every example at once (ranks, quantiles)."""

    size: int
    function: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return self.size

    def of(self, counts: np.ndarray) -> np.ndarray:
        """Its values where example i counts ``counts[:, i]`` times: ``[r, n]`` to ``[r]``."""
        return self.function(counts)


Statistic = Sums | Weighted


@dataclass(frozen=True, eq=False)
class Design:
    """How examples were drawn, and so how they are drawn again."""

    clusters: np.ndarray | None = None
    """What they come in groups of; None where each stands for itself."""
    strata: np.ndarray | None = None
    """Kinds whose numbers are fixed (anomalies and the rest); None for one kind."""


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


def undecided(note: str) -> Evidence:
    """Where the data say nothing."""
    return Evidence(None, 1.0, 1.0, lambda level: None, note)


@dataclass(frozen=True, eq=False)
class Against:
    """What a cell is tested against."""

    reference: Statistic
    design: Design
    contrast: Contrast


class PairedTest(Protocol):
    """How a cell's loss is tested against a margin."""

    def evidence(
        self, cells: Sequence[Statistic], against: Against, confidence: float
    ) -> list[Evidence]:
        """Of each cell, once all examples are seen."""
        ...

    def capital(
        self, cell: Statistic, against: Against, planned: float, level: float
    ) -> tuple[float, float]:
        """Logarithms of e-processes, after any number of examples: that the loss is below the
        margin, and that it is above. Minus infinity where nothing can be said before the end.

        ``planned``: how many times the examples so far will be there at the end; with the
        ``level`` it sets where asymptotic processes are sharpest.
        """
        ...


@dataclass(frozen=True)
class Metric:
    """A named aggregate over the outcomes of a cell beside those of the reference."""

    name: str
    higher_is_better: bool
    statistic: Callable[[Outcomes, Outcomes], Statistic]
    """From (cell, reference)."""
    test: PairedTest | None = None
    """None: the metric is reported, not tested."""
    strata: Callable[[Outcomes], np.ndarray] | None = None
    share: bool = True
    """True where values lie between 0 and 1."""

    def value(self, cell: Outcomes, reference: Outcomes) -> float:
        if len(cell) == 0:
            raise ValueError(f"{self.name} of no examples is not defined")
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(self.statistic(cell, reference).of(np.ones((1, len(cell))))[0])

    def loss(self, value: Any, reference: Any) -> Any:
        """How much worse ``value`` is, numbers or arrays: positive is worse."""
        return reference - value if self.higher_is_better else value - reference

    def contrast(self, kind: str, limit: float) -> Contrast:
        """What a criterion on this metric tests."""
        return Contrast(kind, limit, self.higher_is_better)

    def against(self, reference: Outcomes, contrast: Contrast) -> Against:
        """What cells are tested against."""
        return Against(self.statistic(reference, reference), self.design(reference), contrast)

    def design(self, reference: Outcomes) -> Design:
        return Design(reference.clusters, self.strata(reference) if self.strata else None)
