"""Tallies: observations in the making, one a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from halfstep.activations import position_axis
from halfstep.observation import Channels, Observation, Stand, bulk
from halfstep.operators import Operand
from halfstep.sketch import BINS, Sketch


@dataclass
class Tally:
    """An observation in the making, added to in place: a batch comes by every few milliseconds."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    lo: float = float("inf")
    hi: float = float("-inf")
    batches: dict[int, tuple[float, float]] = field(default_factory=dict)
    examples: int = 0
    channel_sums: Tensor | None = None
    """float64 ``[2, channels]``: of the examples' channel means, and of their squares."""
    positions: tuple[Tensor, Tensor] | None = None
    growth: list[Stand] = field(default_factory=list)

    def add(self, sketch: Sketch, batch: int) -> None:
        self.counts += sketch.counts
        self.lo, self.hi = min(self.lo, sketch.lo), max(self.hi, sketch.hi)
        low, high = self.batches.get(batch, (sketch.lo, sketch.hi))
        self.batches[batch] = (min(low, sketch.lo), max(high, sketch.hi))

    def add_channels(self, x: Tensor, operand: Operand) -> None:
        """Each example's mean over everything but the operand's axis, its channels."""
        if operand.batch is None:
            return
        kept = (operand.batch, operand.axis)
        others = [a for a in range(-x.dim(), 0) if a not in kept]
        means = (x.mean(others) if others else x).double()
        if operand.axis < operand.batch:
            means = means.T
        sums = torch.stack([means.sum(0), means.square().sum(0)])
        if self.channel_sums is not None and self.channel_sums.shape != sums.shape:
            return  # an axis that counts positions, of another length each time
        self.examples += len(means)
        self.channel_sums = sums if self.channel_sums is None else self.channel_sums + sums

    def add_positions(self, x: Tensor, operand: Operand) -> None:
        axis = position_axis(x, operand)
        if axis is None:
            lo, hi = (v[None] for v in torch.aminmax(x))
        else:
            others = [a for a in range(x.dim()) if a != axis]
            lo, hi = x.amin(others), x.amax(others)
        lo, hi = lo.double(), hi.double()
        if self.positions is not None:
            lo = _wider(torch.minimum, self.positions[0], lo)
            hi = _wider(torch.maximum, self.positions[1], hi)
        self.positions = (lo, hi)

    def stand(self, share: float, examples: int) -> None:
        if self.counts.any():
            amax = max(abs(self.lo), abs(self.hi))
            most = min(bulk(self.counts), amax)
            self.growth.append(Stand(share, examples, self.lo, self.hi, most))

    def observation(self) -> Observation:
        ranges = np.array([self.batches[b] for b in sorted(self.batches)], dtype=np.float64)
        channels = None
        if self.channel_sums is not None:
            mean, square = self.channel_sums / self.examples
            channels = Channels(self.examples, mean, (square - mean.square()).clamp(min=0.0))
        return Observation(
            Sketch(self.counts, self.lo, self.hi),
            ranges.reshape(-1, 2),
            channels,
            self.positions,
            tuple(self.growth),
        )


def _wider(choose: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
    """Elementwise over the positions that both have; the longer one's own beyond."""
    short, long = sorted((one, other), key=len)
    return torch.cat([choose(short, long[: len(short)]), long[len(short) :]])
