"""AdaRound: learn for each weight whether it goes up or down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.corrections.parameters import Parameters
from halfstep.formats import Uniform
from halfstep.qparams import QParams

STRETCH = 1.1, -0.1
"""Zeta and gamma: the sigmoid is stretched past 0 and 1, so that it can reach them."""
BETA = 20.0, 2.0
"""The regulariser's exponent falls from the one to the other."""
WARM_UP = 0.2
"""Share of the steps that run without the regulariser."""
WEIGHT = 0.01
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class AdaRound(Parameters):
    """Nagel et al. 2020, equations 21 to 24, on the layer's exact quadratic error.

    The paper minimises the output error over samples; the mean of ``x xᵀ`` holds all that this
    error needs, so no sample is kept. What the relaxation leaves is settled exactly: single weights
    are flipped as long as one lowers the error of its row (a descent in the paper's equation 13),
    and a row keeps round-to-nearest where nothing better was found.
    """

    iterations: int = 300

    name: ClassVar[str] = "adaround"
    stage: ClassVar[str] = "rounding"

    def check(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations are at least 1, not {self.iterations}")

    def round(self, weight: Tensor, qparams: QParams, gram: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded weight, and the weight itself; every value goes to a grid point beside it.

        Args:
            weight: float32 ``[out, reduction]``.
            qparams: broadcast against ``weight``.
            gram: mean of ``x xᵀ``, float64 ``[reduction, reduction]``.
        """
        down, up = neighbours(weight, qparams)
        nearest = (up - weight.double()) < (weight.double() - down)
        learned = self._learn(weight, down, up, gram)
        chosen = _better(weight, down, up, gram, nearest, learned)
        chosen = _flip(weight, down, up, gram, chosen)
        return torch.where(chosen, up, down).float(), weight

    def _learn(self, weight: Tensor, down: Tensor, up: Tensor, gram: Tensor) -> Tensor:
        zeta, gamma = STRETCH
        w, low, step = weight.float(), down.float(), (up - down).float()
        g = gram.float()
        fraction = ((w - low) / step.clamp(min=1e-30)).clamp(0.0, 1.0)
        fraction = torch.where(step > 0, fraction, 0.0)
        v = torch.logit((fraction - gamma) / (zeta - gamma)).requires_grad_(True)
        # In units of the error of rounding each weight by itself, so that one weight of the
        # regulariser fits every layer.
        alone = (step.square() / 12 * g.diagonal()).sum().clamp(min=1e-30) / w.numel()
        optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
        with torch.enable_grad():
            for number in range(self.iterations):
                h = (torch.sigmoid(v) * (zeta - gamma) + gamma).clamp(0.0, 1.0)
                difference = low + h * step - w
                loss = ((difference @ g) * difference).sum() / alone
                progress = number / self.iterations
                if progress >= WARM_UP:
                    left = (1 - progress) / (1 - WARM_UP)
                    beta = BETA[1] + (BETA[0] - BETA[1]) * left
                    loss = loss + WEIGHT * (1 - (2 * h - 1).abs().pow(beta)).sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return (torch.sigmoid(v.detach()) >= 0.5) & (step > 0)


def neighbours(weight: Tensor, qparams: QParams) -> tuple[Tensor, Tensor]:
    """The grid points below and above each weight, dequantized to float64; equal where a weight
    lies on one, or beyond the end of the grid."""
    fmt = qparams.format
    lower, upper = (end.double() for end in fmt.limits(qparams.zero_point))
    scale = qparams.scale.double() if fmt.scaled else torch.ones(1, dtype=torch.float64)
    u = torch.maximum(torch.minimum(weight.double() / scale, upper), lower)
    if isinstance(getattr(fmt, "element", fmt), Uniform):
        down, up = u.floor(), u.ceil()
    else:
        grid = fmt.grid()
        up = grid[torch.bucketize(u, grid).clamp(max=len(grid) - 1)]
        down = grid[torch.bucketize(u, grid, right=True).sub(1).clamp(min=0)]
    return down * scale, up * scale


def row_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error of each row, float64."""
    return ((difference @ gram) * difference).sum(1)


def _better(
    weight: Tensor, down: Tensor, up: Tensor, gram: Tensor, one: Tensor, other: Tensor
) -> Tensor:
    """For each row the rounding with the smaller error; the first of equals."""
    errors = [row_error(torch.where(c, up, down) - weight.double(), gram) for c in (one, other)]
    return torch.where((errors[1] < errors[0])[:, None], other, one)


def _flip(weight: Tensor, down: Tensor, up: Tensor, gram: Tensor, chosen: Tensor) -> Tensor:
    """Flips the most useful weight of each row until none is left that lowers the row's error."""
    chosen = chosen.clone()
    step, diagonal = up - down, gram.diagonal()
    difference = torch.where(chosen, up, down) - weight.double()
    pull = difference @ gram
    rows = torch.arange(len(weight))
    for _ in range(4 * weight.shape[1]):
        move = torch.where(chosen, -step, step)
        gain = 2 * move * pull + move.square() * diagonal
        best, column = gain.min(dim=1)
        # A gain below rounding error would flip back and forth for ever.
        useful = best < -1e-12 * (pull.abs().amax(1) * step.amax(1) + 1e-300)
        if not bool(useful.any()):
            break
        r, c = rows[useful], column[useful]
        pull[r] += move[r, c][:, None] * gram[c]
        chosen[r, c] = ~chosen[r, c]
    return chosen
