"""Bias correction: take out of the bias what rounding shifts on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from halfstep.corrections.parameters import Parameters
from halfstep.moments import Moments


@dataclass(frozen=True)
class BiasCorrection(Parameters):
    """Nagel et al. 2019, section 4.2: ``b' = b - (Q(W) - W) E[x]``, E[x] over calibration data."""

    name: ClassVar[str] = "bias_correction"
    stage: ClassVar[str] = "bias"

    def shift(self, difference: Tensor, moments: Moments) -> Tensor:
        """What rounding adds to each output on average, float64 ``[out]``.

        ``difference``: the quantized matrix minus the original, ``[out, reduction]``.
        """
        d = difference.double().reshape(len(moments.mean), -1, difference.shape[1])
        return (d @ moments.mean[:, :, None]).flatten()
