"""What a calibrator may ask of observed values: extremes, quantiles, weighted points, histograms.

Weights are observed exactly (`Exact`: the blocks themselves); activations through their sketch
(`Sketched`). Both answer the same questions, so each calibrator is written once.
Every answer has one row for each block; a sketch is one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from halfstep.observation import Observation
from halfstep.sketch import Sketch

SUBPOINTS = 8
"""Points that stand for one bin of a sketch, spread evenly over it."""


class Observed(Protocol):
    @property
    def values_per_block(self) -> int: ...

    def extremes(self) -> tuple[Tensor, Tensor]:
        """True minimum and maximum of each block, float64 ``[blocks]``."""
        ...

    def quantile(self, share: float, *, magnitude: bool) -> Tensor:
        """Smallest value that at least ``share`` of the values (or of |values|) do not exceed."""
        ...

    def points(self) -> tuple[Tensor, Tensor | None]:
        """Values (float32) and their weights (float64), both ``[blocks, points]``; no weights where
        each value counts once."""
        ...

    def histogram(self, bins: int) -> np.ndarray:
        """Mass of |x| in equal bins over ``[0, amax]``, float64 ``[blocks, bins]``."""
        ...

    def batch_ranges(self) -> np.ndarray:
        """Smallest and largest value of each batch, float64 ``[batches, 2]``, first batch first."""
        ...


@dataclass(frozen=True, eq=False)
class Exact:
    """Blocks of a weight, float32 ``[blocks, values]``."""

    blocks: Tensor

    @property
    def values_per_block(self) -> int:
        return self.blocks.shape[1]

    def extremes(self) -> tuple[Tensor, Tensor]:
        lo, hi = torch.aminmax(self.blocks, dim=1)
        return lo.double(), hi.double()

    def quantile(self, share: float, *, magnitude: bool) -> Tensor:
        ordered = self._ordered_magnitudes if magnitude else self._ordered
        rank = int(np.ceil(round(share * ordered.shape[1], 9))) - 1
        return ordered[:, max(rank, 0)].double()

    def batch_ranges(self) -> np.ndarray:
        raise ValueError("weights do not come in batches")

    @cached_property
    def _ordered(self) -> Tensor:
        return self.blocks.sort(dim=1).values

    @cached_property
    def _ordered_magnitudes(self) -> Tensor:
        return self.blocks.abs().sort(dim=1).values

    def points(self) -> tuple[Tensor, None]:
        return self.blocks, None

    def histogram(self, bins: int) -> np.ndarray:
        magnitude = self.blocks.abs().double().numpy()
        amax = magnitude.max(axis=1, keepdims=True)
        width = np.where(amax > 0, amax, 1.0)
        index = np.minimum((magnitude / width * bins).astype(np.int64), bins - 1)
        index += np.arange(len(magnitude))[:, None] * bins
        counts = np.bincount(index.ravel(), minlength=len(magnitude) * bins)
        return counts.reshape(len(magnitude), bins).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Sketched:
    """An activation site, through its sketch; inside a bin, mass is taken as evenly spread."""

    observation: Observation

    @property
    def sketch(self) -> Sketch:
        return self.observation.sketch

    @property
    def values_per_block(self) -> int:
        return self.sketch.total

    def batch_ranges(self) -> np.ndarray:
        return self.observation.batch_ranges

    def extremes(self) -> tuple[Tensor, Tensor]:
        return (
            torch.tensor([self.sketch.lo], dtype=torch.float64),
            torch.tensor([self.sketch.hi], dtype=torch.float64),
        )

    def quantile(self, share: float, *, magnitude: bool) -> Tensor:
        lower, upper, counts = self.sketch.magnitude_bins if magnitude else self.sketch.bins
        reached = np.cumsum(counts)
        wanted = share * reached[-1]
        at = min(int(np.searchsorted(reached, wanted)), len(counts) - 1)
        inside = 1.0 - (reached[at] - wanted) / counts[at]
        value = lower[at] + np.clip(inside, 0.0, 1.0) * (upper[at] - lower[at])
        return torch.tensor([value], dtype=torch.float64)

    def points(self) -> tuple[Tensor, Tensor]:
        lower, upper, counts = self.sketch.bins
        steps = (np.arange(SUBPOINTS) + 0.5) / SUBPOINTS
        points = lower[:, None] + steps * (upper - lower)[:, None]
        weights = np.repeat(counts / SUBPOINTS, SUBPOINTS)
        return (
            torch.from_numpy(points.reshape(1, -1)).float(),
            torch.from_numpy(weights.reshape(1, -1)),
        )

    def histogram(self, bins: int) -> np.ndarray:
        lower, upper, counts = self.sketch.magnitude_bins
        amax = self.sketch.amax
        edges = np.linspace(0.0, amax if amax > 0 else 1.0, bins + 1)
        spread = upper > lower
        mass = np.zeros(bins + 1)
        for at, sign in ((lower, 1.0), (upper, -1.0)):
            # Each bin contributes (e - at) * density to the mass below an edge e > at; summed for
            # all edges at once from prefix sums over the sorted `at`.
            order = np.argsort(at[spread], kind="stable")
            start = at[spread][order]
            density = (counts[spread] / (upper - lower)[spread])[order]
            ahead = np.searchsorted(start, edges, side="left")
            total = np.concatenate([[0.0], np.cumsum(density)])[ahead]
            moment = np.concatenate([[0.0], np.cumsum(density * start)])[ahead]
            mass += sign * (edges * total - moment)
        result = np.maximum(np.diff(mass), 0.0)
        width = edges[1]
        index = np.minimum((lower[~spread] / width).astype(np.int64), bins - 1)
        np.add.at(result, index, counts[~spread].astype(np.float64))
        return result[None]
