"""How a cell's metric is set against the reference's, or against a fixed limit: as a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

DIFFERENCE, RELATIVE, ALONE = "difference", "relative", "alone"


@dataclass(frozen=True)
class Contrast:
    """A loss that has to stay below `margin`: more is worse, whatever the metric's direction.

    ``difference``: by how much the cell is worse. ``relative``: the same as a share of the
    reference's value. ``alone``: how far the cell is beyond a floor or ceiling, the reference
    having no say; below zero where it keeps it.
    """

    kind: str
    limit: float
    """The margin; for ``alone`` the floor or the ceiling."""
    higher_is_better: bool

    @property
    def margin(self) -> float:
        return 0.0 if self.kind == ALONE else self.limit

    @property
    def sign(self) -> int:
        return 1 if self.higher_is_better else -1

    def loss(self, ours: Any, theirs: Any) -> Any:
        """From values of the metric, numbers or arrays of one shape."""
        if self.kind == ALONE:
            return self.sign * (self.limit - ours)
        worse = self.sign * (theirs - ours)
        if self.kind == DIFFERENCE:
            return worse
        with np.errstate(invalid="ignore", divide="ignore"):
            return worse / np.abs(theirs)

    def linear(self, reference: float) -> tuple[float, float]:
        """``(a, m)`` such that the loss is at least the margin where ``sign (a theirs - ours)`` is
        at least ``m``: means of such differences are what tests of means look at.

        ``reference``: the reference's value; a relative margin needs its sign.
        """
        if self.kind == DIFFERENCE:
            return 1.0, self.limit
        if self.kind == RELATIVE:
            return 1.0 - self.sign * self.limit * float(np.sign(reference)), 0.0
        return 0.0, -self.sign * self.limit
