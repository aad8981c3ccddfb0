"""Observations: everything that one pass over the calibration data leaves of an activation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfstep.sketch import Sketch

GROWTH_SHARES = (0.125, 0.25, 0.5)
"""After these shares of the calibration data the range so far is noted down."""
BULK = 0.9999
SETTLED = 0.05
"""A range that grew by less than this over the second half of the data counts as settled."""


@dataclass(frozen=True)
class Stand:
    """A site's range after a part of the calibration data."""

    share: float
    examples: int
    lo: float
    hi: float
    bulk: float
    """The 99.99 % quantile of ``|x|``."""

    @property
    def amax(self) -> float:
        return max(abs(self.lo), abs(self.hi))


@dataclass(frozen=True, eq=False)
class Observation:
    """Of one activation site."""

    sketch: Sketch
    batch_ranges: np.ndarray
    """float64 ``[batches, 2]``: smallest and largest value of each batch, in canonical order."""
    positions: tuple[Tensor, Tensor] | None = None
    """Smallest and largest value at each token position, float64; only where a scheme asked."""
    growth: tuple[Stand, ...] = ()
    """The range after 1/8, 1/4, 1/2 and all of the data."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the data, whatever calibrator reads it."""
        notes = []
        if self.sketch.lo == self.sketch.hi:
            notes.append(
                f"activation is constant at {self.sketch.lo:g} over the calibration data"
            )
        if not self.settled:
            half, whole = self.growth[-2], self.growth[-1]
            notes.append(
                f"range still moved over the second half of the calibration data: extremes "
                f"{half.amax:.4g} to {whole.amax:.4g}, 99.99 % of values {half.bulk:.4g} to "
                f"{whole.bulk:.4g}; more data would move it further"
            )
        return tuple(notes)

    @property
    def settled(self) -> bool:
        """False where the bulk of the range moved by more than `SETTLED` over the second half."""
        if len(self.growth) < 2:
            return True
        half, whole = self.growth[-2], self.growth[-1]
        return abs(whole.bulk - half.bulk) <= SETTLED * max(whole.bulk, half.bulk)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors for safetensors."""
        kept = self.sketch.tensors() | {"batch_ranges": torch.from_numpy(self.batch_ranges)}
        if self.positions is not None:
            kept["positions"] = torch.stack(self.positions)
        rows = [[s.share, s.examples, s.lo, s.hi, s.bulk] for s in self.growth]
        return kept | {"growth": torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Observation:
        positions = tensors.get("positions")
        return Observation(
            Sketch.from_tensors(tensors),
            tensors["batch_ranges"].numpy(),
            (positions[0], positions[1]) if positions is not None else None,
            tuple(
                Stand(share, int(examples), lo, hi, bulk)
                for share, examples, lo, hi, bulk in tensors["growth"].tolist()
            ),
        )


def bulk(sketch: Sketch) -> float:
    """The `BULK` quantile of ``|x|``: the upper edge of the bin that reaches it."""
    _, upper, counts = sketch.magnitude_bins
    if len(counts) == 0:
        return 0.0
    reached = np.cumsum(counts)
    return float(upper[min(int(np.searchsorted(reached, BULK * reached[-1])), len(upper) - 1)])
