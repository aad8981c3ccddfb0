"""AdaRound: learn for each weight whether it goes up or down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.corrections.gptq import compensated
from halfstep.corrections.parameters import Parameters
from halfstep.formats import Uniform
from halfstep.qparams import QParams

STRETCH = 1.1, -0.1
"""Zeta and gamma: the sigmoid is stretched past 0 and 1, so that it can reach them."""
BETA = 20.0, 2.0
"""The regulariser's exponent falls from the one to the other."""
WARM_UP = 0.2
"""Share of the steps that run without the regulariser."""
WEIGHT = 1.0
"""Of the regulariser, in units of the error of rounding one weight by itself."""
LEARNING_RATE = 0.01
COMPENSATION_DAMP = 0.01
PAIRED = 16


@dataclass(frozen=True)
class AdaRound(Parameters):
    """Nagel et al. 2020, equations 21 to 24, on the layer's exact quadratic error.

    The paper minimises the output error over samples; the mean of ``x xᵀ`` holds all that this
    error needs, so no sample is kept. What the relaxation finds is settled exactly: single weights
    and pairs are flipped as long as that lowers the error of their row (a descent in the paper's
    equation 13).
    The same descent runs from round-to-nearest and from a rounding with compensation; each row
    keeps the best of the three, so none is worse than round-to-nearest.
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
        starts = (
            nearest,
            self._learn(weight, down, up, gram),
            _compensated(weight, down, up, gram),
        )
        chosen = nearest
        for start in starts:
            settled = _settle(weight, down, up, gram, start)
            chosen = _better(weight, down, up, gram, chosen, settled)
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


def _compensated(weight: Tensor, down: Tensor, up: Tensor, gram: Tensor) -> Tensor:
    """Column by column to the neighbour that is nearest once the errors so far are made up for
    (GPTQ's step, kept between the neighbours)."""

    def pick(column: Tensor, at: int) -> Tensor:
        upward = up[:, at] - column < column - down[:, at]
        return torch.where(upward, up[:, at], down[:, at])

    return compensated(weight, gram, COMPENSATION_DAMP, pick)[0] == up


def _settle(weight: Tensor, down: Tensor, up: Tensor, gram: Tensor, chosen: Tensor) -> Tensor:
    """Flips single weights and pairs of weights until no flip lowers the error of any row."""
    chosen = chosen.clone()
    step = up - down
    difference = torch.where(chosen, up, down) - weight.double()
    pull = difference @ gram
    moving = torch.arange(len(weight))  # rows that may still gain
    for _ in range(4 * weight.shape[1]):
        pulled, steps = pull[moving], step[moving]
        move = torch.where(chosen[moving], -steps, steps)
        gain = 2 * move * pulled + move.square() * gram.diagonal()
        best, column = gain.min(dim=1)
        # A gain below rounding error would flip back and forth for ever.
        least = -1e-12 * (pulled.abs().amax(1) * steps.amax(1) + 1e-300)
        useful = best < least
        flips = [column]
        if not bool(useful.any()):
            first, second, both = _best_pair(move, gain, gram)
            useful = both < least
            flips = [first, second]
        rows = moving[useful]
        if len(rows) == 0:
            break
        for columns in flips:
            c = columns[useful]
            pull[rows] += move[useful, c][:, None] * gram[c]
            chosen[rows, c] = ~chosen[rows, c]
        if len(flips) == 2:
            moving = rows
    return chosen


def _best_pair(move: Tensor, gain: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row the best two weights to flip together, and what that gains; the first of them is
    sought among the `PAIRED` that cost least alone."""
    first = gain.topk(min(PAIRED, gain.shape[1]), dim=1, largest=False).indices
    alone, moved = gain.gather(1, first), move.gather(1, first)
    both = alone[:, :, None] + gain[:, None] + 2 * moved[:, :, None] * move[:, None] * gram[first]
    both.scatter_(2, first[:, :, None], float("inf"))  # a weight cannot be flipped twice
    best, at = both.flatten(1).min(dim=1)
    at_first = at // gain.shape[1]
    return first.gather(1, at_first[:, None])[:, 0], at % gain.shape[1], best
