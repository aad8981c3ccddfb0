"""SmoothQuant: move the spread between channels from the activations into the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.corrections.parameters import Parameters


@dataclass(frozen=True)
class SmoothQuant(Parameters):
    """Xiao et al. 2022, equation 4: ``s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)``.

    The input is divided by s and the weight's columns are multiplied by it, so at full precision
    nothing changes. Layers that read the same input share one s, which a deployed model folds into
    the norm before them.
    """

    alpha: float = 0.5

    name: ClassVar[str] = "smoothquant"
    stage: ClassVar[str] = "rewrite"

    def check(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha lies between 0 and 1, not {self.alpha:g}")

    def factors(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """s of each channel (float64) from the largest ``|x|`` and ``|w|`` of each channel.

        A channel that is never active, or that no weight reads, is left alone.
        """
        s = inputs.double().pow(self.alpha) / weights.double().pow(1 - self.alpha)
        return torch.where((inputs > 0) & (weights > 0), s.clamp(1e-5, 1e5), 1.0)
