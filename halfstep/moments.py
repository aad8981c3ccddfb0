"""Moments: what corrections need to know of the inputs that meet a weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.batches import Batch, forward
from halfstep.intercept import Interception
from halfstep.operators import Operand, Read
from halfstep.sites import Sites

ROWS_PER_BATCH = 8192
"""At most this many input rows of one batch are taken, evenly spread: bounds the cost."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Over the rows that meet a weight's ``[out, reduction]`` matrix (a convolution's patches).

    Grouped convolutions have one set of rows for each group; otherwise ``groups`` is 1.
    """

    mean: Tensor
    """float64 ``[groups, reduction]``."""
    gram: Tensor
    """Mean of ``x xᵀ``, float64 ``[groups, reduction, reduction]``."""
    magnitude: Tensor
    """Mean of ``|x|``, float64 ``[groups, reduction]``."""
    amax: Tensor
    """Largest ``|x|``, float64 ``[groups, reduction]``."""
    kernel: int
    """Columns that belong to one input channel, side by side."""

    def divided(self, factor: Tensor) -> Moments:
        """The moments of ``x / factor``; ``factor`` is positive, ``[groups, reduction]``."""
        f = factor.double()
        return Moments(
            self.mean / f,
            self.gram / f[:, :, None] / f[:, None, :],
            self.magnitude / f,
            self.amax / f,
            self.kernel,
        )

    def by_channel(self, values: Tensor, reduce: str) -> Tensor:
        """``values`` of the columns, one a channel ``[groups * channels]``: amax or mean."""
        grouped = values.reshape(len(values), -1, self.kernel)
        return (grouped.amax(-1) if reduce == "amax" else grouped.mean(-1)).flatten()

    def by_column(self, channels: Tensor) -> Tensor:
        """One value a channel, repeated for the channel's columns: ``[groups, reduction]``."""
        return channels.reshape(len(self.mean), -1).repeat_interleave(self.kernel, dim=1)

    def output_error(self, difference: Tensor) -> Tensor:
        """Mean squared output error of each row of ``difference`` ``[out, reduction]``."""
        d = difference.double().reshape(len(self.gram), -1, difference.shape[1])
        return torch.einsum("gok,gkl,gol->go", d, self.gram, d).flatten().clamp(min=0.0)


class _Tally:
    def __init__(self, groups: int, columns: int) -> None:
        self.rows = 0
        self.sum = torch.zeros(groups, columns, dtype=torch.float64)
        self.products = torch.zeros(groups, columns, columns, dtype=torch.float64)
        self.magnitude = torch.zeros(groups, columns, dtype=torch.float64)
        self.amax = torch.zeros(groups, columns, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """``rows``: ``[n, groups, columns]``."""
        x = rows.transpose(0, 1).contiguous()
        self.rows += len(rows)
        self.sum += x.sum(1, dtype=torch.float64)
        self.products += (x.mT @ x).double()
        magnitude = x.abs()
        self.magnitude += magnitude.sum(1, dtype=torch.float64)
        self.amax = torch.maximum(self.amax, magnitude.amax(1).double())

    def moments(self, kernel: int) -> Moments:
        n = self.rows
        return Moments(self.sum / n, self.products / n, self.magnitude / n, self.amax, kernel)


def input_rows(kind: str, operand: Operand, x: Tensor, read: Read) -> tuple[Tensor, int] | None:
    """What meets the rows of a weight: ``[n, groups, reduction]``, and columns a channel.

    None for operations whose input does not meet the weight row by row (transposed convolutions).
    """
    if not operand.whole_example:
        rows = x.movedim(operand.axis, -1)
        return rows.reshape(-1, 1, rows.shape[-1]), 1
    if "transpose" in kind:
        return None
    dimensions = -operand.axis - 1
    weight = read(1, "weight", None)
    size = list(weight.shape[2:])
    stride = _each(read(3, "stride", 1), dimensions)
    padding = read(4, "padding", 0)
    dilation = _each(read(5, "dilation", 1), dimensions)
    groups = read(6, "groups", 1)
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    if isinstance(padding, str):
        both = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
    else:
        both = [(p, p) for p in _each(padding, dimensions)]
    x = F.pad(x, list(itertools.chain(*reversed(both))))
    for i in range(dimensions):
        x = x.unfold(2 + i, reach[i] + 1, stride[i])[..., :: dilation[i]]
    # [n, channels, *places, *kernel] to [n * places, groups, channels / groups * kernel]
    kernel = math.prod(size)
    columns = x.shape[1] // groups * kernel
    return x.movedim(1, 1 + dimensions).reshape(-1, groups, columns), kernel


def _each(value: Any, dimensions: int) -> list[int]:
    return (
        [value] * dimensions
        if isinstance(value, int)
        else list(value) * (dimensions if len(value) == 1 else 1)
    )


def gather(
    model: nn.Module, sites: Sites, batches: Iterable[Batch], wanted: Sequence[str]
) -> dict[str, Moments]:
    """One pass over the calibration data: the moments of the inputs of some weight sites.

    A weight that is used several times has the moments of all its uses together.
    """
    site_of = {a.name: a for a in sites.activations if a.weight in wanted}
    tallies: dict[str, _Tally] = {}
    kernels: dict[str, int] = {}

    def visit(name: str, operand: Operand, x: Tensor) -> Tensor:
        site = site_of.get(name)
        if site is None or site.weight is None:
            return x
        found = input_rows(site.kind, operand, x.detach(), mode.read)
        if found is None:
            return x
        rows, kernel = found
        if len(rows) > ROWS_PER_BATCH:
            step = -(-len(rows) // ROWS_PER_BATCH)
            rows = rows[::step]
        if site.weight not in tallies:
            tallies[site.weight] = _Tally(rows.shape[1], rows.shape[2])
            kernels[site.weight] = kernel
        tallies[site.weight].add(rows)
        return x

    mode = Interception(visit, alters=False)
    with torch.no_grad(), mode.over(model):
        for batch in batches:
            forward(model, batch)
    return {name: tally.moments(kernels[name]) for name, tally in tallies.items()}
