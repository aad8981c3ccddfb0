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
"""A range that moved by less than this over the second half of the data counts as settled."""


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
class Channels:
    """How each channel's mean over an example spreads from example to example."""

    examples: int
    mean: Tensor
    """float64 ``[channels]``."""
    variance: Tensor
    """float64 ``[channels]``, of the examples' means."""

    def tensors(self) -> dict[str, Tensor]:
        count = torch.tensor([self.examples], dtype=torch.int64)
        return {
            "channel_examples": count,
            "channel_moments": torch.stack([self.mean, self.variance]),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Channels:
        mean, variance = tensors["channel_moments"]
        return Channels(int(tensors["channel_examples"]), mean, variance)


@dataclass(frozen=True, eq=False)
class Observation:
    """Of one activation site."""

    sketch: Sketch
    batch_ranges: np.ndarray
    """float64 ``[batches, 2]``: smallest and largest value of each batch, in canonical order."""
    channels: Channels | None = None
    positions: tuple[Tensor, Tensor] | None = None
    """Smallest and largest value at each token position, float64; only where a scheme asked."""
    growth: tuple[Stand, ...] = ()
    """The range after 1/8, 1/4, 1/2 and all of the data."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the data, whatever calibrator reads it."""
        if self.sketch.lo == self.sketch.hi:
            return (f"activation is constant at {self.sketch.lo:g} over the calibration data",)
        return ()

    @property
    def moved(self) -> float:
        """By how much the second half of the data moved the range: the larger of the relative
        changes of the extremes and of the 99.99 % quantile. 0 where that is not known."""
        if len(self.growth) < 2:
            return 0.0
        half, whole = self.growth[-2], self.growth[-1]
        pairs = ((half.amax, whole.amax), (half.bulk, whole.bulk))
        return max(abs(b - a) / max(a, b, 1e-30) for a, b in pairs)

    @property
    def settled(self) -> bool:
        """False where more data would still move the range by more than `SETTLED`."""
        return self.moved <= SETTLED

    def tensors(self) -> dict[str, Tensor]:
        """As tensors for safetensors."""
        kept = self.sketch.tensors() | {"batch_ranges": torch.from_numpy(self.batch_ranges)}
        if self.channels is not None:
            kept |= self.channels.tensors()
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
            Channels.from_tensors(tensors) if "channel_moments" in tensors else None,
            (positions[0], positions[1]) if positions is not None else None,
            tuple(
                Stand(share, int(examples), lo, hi, bulk)
                for share, examples, lo, hi, bulk in tensors["growth"].tolist()
            ),
        )


def bulk(counts: np.ndarray) -> float:
    """The `BULK` quantile of ``|x|`` from a sketch's counts: the upper edge of the bin that reaches
    it. Without the sign bit the patterns rise with the magnitude."""
    reached = np.cumsum(counts.reshape(2, -1).sum(axis=0))
    pattern = int(np.searchsorted(reached, BULK * reached[-1]))
    return float(np.array([(pattern << 16) | 0xFFFF], dtype=np.uint32).view(np.float32)[0])
