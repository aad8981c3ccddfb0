"""GPTQ: round column by column, and let the columns that are left make up for the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.corrections.parameters import Parameters
from halfstep.qparams import QParams
from halfstep.quantize import fake_quantize

BLOCK = 128
"""Columns between two updates of the whole rest; any value gives the same result up to rounding."""


@dataclass(frozen=True)
class Gptq(Parameters):
    """Frantar et al. 2022, algorithm 1. Scales are those of the uncorrected weight."""

    damp: float = 0.01
    """Added to the Gram matrix's diagonal, as a share of its mean."""

    name: ClassVar[str] = "gptq"
    stage: ClassVar[str] = "rounding"

    def check(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp is above 0 and up to 1, not {self.damp:g}")

    def round(self, weight: Tensor, qparams: QParams, gram: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded weight, and the weight as it stood when each column was rounded.

        Args:
            weight: float32 ``[out, reduction]``.
            qparams: broadcast against ``weight``.
            gram: mean of ``x xᵀ``, float64 ``[reduction, reduction]``.
        """
        scale = qparams.scale.expand(weight.shape)
        zero_point = qparams.zero_point.expand(weight.shape)

        def pick(column: Tensor, at: int) -> Tensor:
            own = QParams(qparams.format, scale[:, at : at + 1], zero_point[:, at : at + 1])
            return fake_quantize(column.float()[:, None], own)[:, 0]

        rounded, target = compensated(weight, gram, self.damp, pick)
        return rounded.float(), target.float()


def compensated(
    weight: Tensor, gram: Tensor, damp: float, pick: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Column by column to the value that ``pick`` chooses (from the column as it stands, float64,
    and its number), the columns that are left making up for the error.

    Returns what was picked, and the columns as they stood, both float64.
    """
    columns = weight.shape[1]
    factor = inverse_factor(gram, damp)
    rest = weight.double().clone()
    target, picked = torch.empty_like(rest), torch.empty_like(rest)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, errors = rest[:, start:end], torch.empty(len(weight), end - start).double()
        for i in range(end - start):
            at = start + i
            target[:, at] = block[:, i]
            picked[:, at] = pick(block[:, i], at)
            errors[:, i] = (block[:, i] - picked[:, at]) / factor[at, at]
            block[:, i:] -= errors[:, i : i + 1] * factor[at, at:end]
        rest[:, end:] -= errors @ factor[start:end, end:]
    return picked, target


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Gram matrix, float64.

    An input that never occurs has a zero on the diagonal: one is put there, so that its column is
    rounded by itself and moves no other.
    """
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damp * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
