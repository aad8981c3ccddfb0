"""AWQ: protect the weights that meet large inputs by scaling their columns up before rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halfstep.corrections.parameters import Parameters
from halfstep.moments import Moments


@dataclass(frozen=True)
class Awq(Parameters):
    """Lin et al. 2023, section 3.2: ``s = mean|x| ** alpha``, alpha from a grid over [0, 1).

    For weights alone. The columns are multiplied by s before rounding and divided by it after, so
    at full precision nothing changes; alpha 0 is no scaling at all, so the search cannot lose.
    """

    grid: int = 20
    """How many alphas are tried."""

    name: ClassVar[str] = "awq"
    stage: ClassVar[str] = "scale"

    def check(self) -> None:
        if self.grid < 2:
            raise ValueError(f"grid is at least 2, not {self.grid}")

    def search(
        self, weight: Tensor, moments: Moments, rounded: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, float]:
        """The factors of the columns, float32 ``[groups, reduction]``, and their alpha.

        ``rounded`` quantizes and dequantizes a matrix. The error is the exact mean squared error
        of the outputs over the calibration data.
        """
        best: tuple[float, Tensor, float] | None = None
        for step in range(self.grid):
            alpha = step / self.grid
            factors = scaling(moments, alpha)
            spread = spread_over_rows(factors, weight)
            error = float(moments.output_error(rounded(weight * spread) / spread - weight).sum())
            if best is None or error < best[0]:
                best = (error, factors, alpha)
        assert best is not None
        return best[1], best[2]


def scaling(moments: Moments, alpha: float) -> Tensor:
    """``mean|x|`` of each channel to the power of alpha, centred as the published code does it."""
    channels = moments.by_channel(moments.magnitude, "mean").clamp(min=1e-4).pow(alpha)
    channels = channels / (channels.max() * channels.min()).sqrt()
    return moments.by_column(channels).float()


def spread_over_rows(factors: Tensor, weight: Tensor) -> Tensor:
    """One row of factors a group, repeated for the group's rows: ``[out, reduction]``."""
    return factors.repeat_interleave(len(weight) // len(factors), dim=0)
