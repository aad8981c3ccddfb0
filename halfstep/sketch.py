"""Sketches: what one pass over the calibration data leaves of an activation site.

A sketch counts values by the upper 16 bits of their float32 pattern: sign, exponent and seven
mantissa bits. There is no range to choose, so nothing depends on the order of the batches; counts
are integers, so merging is exact; a bin is at most 2**-7 of its value wide, so the bulk stays
resolved beside an outlier 10,000 times larger; and 65,536 counters are all the memory it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

BINS = 65536
_EXPONENT_ALL_ONES = 0x7F80  # infinities and NaN start here, for either sign


def count_patterns(x: Tensor) -> np.ndarray:
    """Counts ``x`` (any float dtype and device) by float32 upper half: int64, shape (65536,).

    Torch's operators run without Python's lock, so this may go on beside a forward pass.
    """
    halves = x.detach().float().contiguous().flatten().view(torch.int32) >> 16
    return torch.bincount(halves.bitwise_and_(0xFFFF), minlength=BINS).cpu().numpy()


@dataclass(frozen=True)
class Sketch:
    """Counts by bit pattern, and the true extremes. Merge with ``+``: exact, in any order."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    lo: float = float("inf")
    hi: float = float("-inf")

    @staticmethod
    def of(x: Tensor) -> Sketch:
        """The sketch of one tensor's values."""
        # ``aminmax`` takes twelve times as long where channels are last.
        # Zero has one sign here, whichever came first.
        return Sketch(count_patterns(x), float(x.amin()) + 0.0, float(x.amax()) + 0.0)

    def __add__(self, other: Sketch) -> Sketch:
        return Sketch(self.counts + other.counts, min(self.lo, other.lo), max(self.hi, other.hi))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def amax(self) -> float:
        """Largest magnitude."""
        return max(abs(self.lo), abs(self.hi))

    @property
    def nonfinite(self) -> int:
        """How many NaN and infinities were seen."""
        top = self.counts.reshape(2, -1)[:, _EXPONENT_ALL_ONES:]
        return int(top.sum())

    @cached_property
    def bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Non-empty bins by rising value: lower edge, upper edge (float64), count (int64).

        Edges are cut at the true extremes, so no bin claims values that never occurred.
        """
        used = np.flatnonzero(self.counts)
        near = (used.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        far = ((used.astype(np.uint32) << 16) | 0xFFFF).view(np.float32).astype(np.float64)
        lower = np.clip(np.minimum(near, far), self.lo, self.hi)
        upper = np.clip(np.maximum(near, far), self.lo, self.hi)
        # Exact zeros dominate after a ReLU; their bin (down to 2**-133) is a point, not a width.
        is_zero = (used == 0) | (used == 0x8000)
        lower[is_zero] = upper[is_zero] = 0.0
        order = np.lexsort((upper, lower))
        return lower[order], upper[order], self.counts[used][order]

    @cached_property
    def magnitude_bins(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bins of ``|x|``, both signs merged, by rising value."""
        lower, upper, counts = self.bins
        low = np.where(upper <= 0, -upper, lower)
        high = np.where(upper <= 0, -lower, upper)
        order = np.lexsort((high, low))
        return low[order], high[order], counts[order]

    def tensors(self) -> dict[str, Tensor]:
        """The sketch as tensors for safetensors: used bin indices, their counts, extremes."""
        used = np.flatnonzero(self.counts)
        return {
            "bins": torch.from_numpy(used.astype(np.int32)),
            "counts": torch.from_numpy(self.counts[used]),
            "range": torch.tensor([self.lo, self.hi], dtype=torch.float64),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Sketch:
        counts = np.zeros(BINS, dtype=np.int64)
        counts[tensors["bins"].numpy()] = tensors["counts"].numpy()
        lo, hi = tensors["range"].tolist()
        return Sketch(counts, lo, hi)
