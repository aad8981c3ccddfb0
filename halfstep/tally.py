"""Tallies: observations in the making, one a site, and parts of them that workers made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    channel_sums: dict[int, Tensor] = field(default_factory=dict)
    """By segment of the calibration data, float64 ``[2, channels]``: of the examples' channel
    means, and of their squares. Segments are summed in order at the end, so that the sums round
    alike whichever worker had which segments."""
    channels_vary: bool = False
    """The axis counts positions, and is of another length each time: it has no channels."""
    positions: tuple[Tensor, Tensor] | None = None
    growth: list[Stand] = field(default_factory=list)

    def add(self, sketch: Sketch, batch: int) -> None:
        self.counts += sketch.counts
        self.lo, self.hi = min(self.lo, sketch.lo), max(self.hi, sketch.hi)
        low, high = self.batches.get(batch, (sketch.lo, sketch.hi))
        self.batches[batch] = (min(low, sketch.lo), max(high, sketch.hi))

    def add_channels(self, x: Tensor, operand: Operand, segment: int = 0) -> None:
        """Each example's mean over everything but the operand's axis, its channels."""
        if operand.batch is None:
            return
        kept = (operand.batch, operand.axis)
        others = [a for a in range(-x.dim(), 0) if a not in kept]
        means = (x.mean(others) if others else x).double()
        if operand.axis < operand.batch:
            means = means.T
        sums = torch.stack([means.sum(0), means.square().sum(0)])
        self.examples += len(means)
        self._add_sums(segment, sums)

    def _add_sums(self, segment: int, sums: Tensor) -> None:
        known = next(iter(self.channel_sums.values()), sums)
        self.channels_vary = self.channels_vary or known.shape != sums.shape
        if not self.channels_vary:
            before = self.channel_sums.get(segment)
            self.channel_sums[segment] = sums if before is None else before + sums

    def add_positions(self, x: Tensor, operand: Operand) -> None:
        axis = position_axis(x, operand)
        if axis is None:
            lo, hi = (v[None] for v in torch.aminmax(x))
        else:
            others = [a for a in range(x.dim()) if a != axis]
            lo, hi = x.amin(others), x.amax(others)
        lo, hi = lo.double(), hi.double()
        self._widen_positions(lo, hi)

    def _widen_positions(self, lo: Tensor, hi: Tensor) -> None:
        if self.positions is not None:
            lo = _wider(torch.minimum, self.positions[0], lo)
            hi = _wider(torch.maximum, self.positions[1], hi)
        self.positions = (lo, hi)

    def merge(self, later: Tally) -> None:
        """Adds what was counted on later segments: the same bits as counting them here."""
        self.counts += later.counts
        self.lo, self.hi = min(self.lo, later.lo), max(self.hi, later.hi)
        self.batches |= later.batches
        self.examples += later.examples
        self.channels_vary = self.channels_vary or later.channels_vary
        for segment, sums in later.channel_sums.items():
            self._add_sums(segment, sums)
        if later.positions is not None:
            self._widen_positions(*later.positions)

    def stand(self, share: float, examples: int) -> None:
        if self.counts.any():
            amax = max(abs(self.lo), abs(self.hi))
            most = min(bulk(self.counts), amax)
            self.growth.append(Stand(share, examples, self.lo, self.hi, most))

    def observation(self) -> Observation:
        ranges = np.array([self.batches[b] for b in sorted(self.batches)], dtype=np.float64)
        channels = None
        if self.channel_sums and not self.channels_vary:
            ordered = [self.channel_sums[segment] for segment in sorted(self.channel_sums)]
            mean, square = torch.stack(ordered).sum(0) / self.examples
            channels = Channels(self.examples, mean, (square - mean.square()).clamp(min=0.0))
        return Observation(
            Sketch(self.counts, self.lo, self.hi),
            ranges.reshape(-1, 2),
            channels,
            self.positions,
            tuple(self.growth),
        )

    def tensors(self) -> dict[str, Tensor]:
        """As tensors, to travel from a worker; growth is noted where parts are merged."""
        used = np.flatnonzero(self.counts)
        kept = {
            "patterns": torch.from_numpy(used.astype(np.int32)),
            "counts": torch.from_numpy(self.counts[used]),
            "range": torch.tensor([self.lo, self.hi], dtype=torch.float64),
            "batches": torch.tensor([*self.batches], dtype=torch.int64),
            "batch_ranges": torch.tensor([*self.batches.values()], dtype=torch.float64),
            "examples": torch.tensor([self.examples, self.channels_vary], dtype=torch.int64),
        }
        if self.channel_sums and not self.channels_vary:
            kept["segments"] = torch.tensor([*self.channel_sums], dtype=torch.int64)
            kept["channel_sums"] = torch.stack([*self.channel_sums.values()])
        if self.positions is not None:
            kept["positions"] = torch.stack(self.positions)
        return kept

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Tally:
        lo, hi = tensors["range"].tolist()
        examples, vary = tensors["examples"].tolist()
        ranges = zip(tensors["batches"].tolist(), tensors["batch_ranges"].tolist(), strict=True)
        sums = {}
        if "segments" in tensors:
            sums = dict(zip(tensors["segments"].tolist(), tensors["channel_sums"], strict=True))
        positions = tensors.get("positions")
        counts = np.zeros(BINS, dtype=np.int64)
        counts[tensors["patterns"].numpy()] = tensors["counts"].numpy()
        return Tally(
            counts,
            lo,
            hi,
            {batch: (low, high) for batch, (low, high) in ranges},
            examples,
            sums,
            bool(vary),
            (positions[0], positions[1]) if positions is not None else None,
        )


def _wider(choose: Callable[[Tensor, Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
    """Elementwise over the positions that both have; the longer one's own beyond."""
    short, long = sorted((one, other), key=len)
    return torch.cat([choose(short, long[: len(short)]), long[len(short) :]])
