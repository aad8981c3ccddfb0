"""The search for the range with the least error: many candidates, each by the format's rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.formats import Format

CHUNK = 4_000_000
"""Elements of one temporary: bounds memory, not results."""


class RangeSearch:
    """The least error so far over shrunken ranges, block by block; of equals the first."""

    def __init__(
        self,
        fmt: Format,
        power: float,
        values: Tensor,
        weights: Tensor | None,
        low: Tensor,
        high: Tensor,
    ) -> None:
        self._fmt, self._power = fmt, power
        self._values, self._weights = values, weights
        self._low, self._high = low, high
        self._open = torch.arange(len(low))  # blocks whose search goes on
        self._least = torch.full((len(low),), float("inf"), dtype=torch.float64)
        self.factor = torch.ones(len(low), dtype=torch.float64)

    def try_all(self, factors: Tensor) -> None:
        """``factors``: ``[candidates, blocks]``."""
        values, rows = self._rows()
        chunk = max(1, CHUNK // values.numel())
        for part in torch.split(factors[:, rows], chunk):
            scale, lower, upper = self._grid(part, rows)
            u = values * scale.reciprocal()
            error = self._fmt.round_(u, lower, upper).mul_(scale).sub_(values)
            self._keep(self._total(error), part, rows)

    def could_still_win(self, factor: Tensor) -> bool:
        """Closes the blocks where clipping alone, which only grows as the range shrinks, costs more
        than the best so far; False where none is left open."""
        values, rows = self._rows()
        scale, lower, upper = self._grid(factor.expand(1, len(rows)), rows)
        bottom, top = lower * scale, upper * scale
        if not self._fmt.symmetric:
            # Rounding the zero point may move either end by half a step, at this factor or another.
            ends = (self._low[rows].clamp(max=0) * factor, self._high[rows].clamp(min=0) * factor)
            bottom, top = ends[0][:, None] - scale / 2, ends[1][:, None] + scale / 2
        beyond = torch.maximum(values - top, bottom - values).clamp_(min=0.0)
        self._open = rows[self._total(beyond)[0] <= self._least[rows]]
        return len(self._open) > 0

    def _rows(self) -> tuple[Tensor, Tensor]:
        rows = self._open
        whole = len(rows) == len(self._low)
        return (self._values if whole else self._values[rows]), rows

    def _grid(self, factors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self._low[rows] * factors, self._high[rows] * factors
        scale, zero_point = self._fmt.qparams(low, high)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny).float()[..., None]
        return scale, *self._fmt.limits(zero_point[..., None])

    def _total(self, error: Tensor) -> Tensor:
        """Sum over each block of ``|error| ** power``, float64."""
        error = error.square_() if self._power == 2 else error.abs_().pow_(self._power)
        if self._weights is None:
            return error.sum(dim=-1, dtype=torch.float64)
        return (error * self._weights).sum(dim=-1)

    def _keep(self, errors: Tensor, factors: Tensor, rows: Tensor) -> None:
        least, at = errors.min(dim=0)
        better = least < self._least[rows]
        self.factor[rows[better]] = factors.gather(0, at[None])[0][better]
        self._least[rows[better]] = least[better]
