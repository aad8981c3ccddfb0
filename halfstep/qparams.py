"""Quantization parameters: what fixes the map from numbers to codes at one site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.formats import Format, NvFp4

TINIEST_SCALE = float(torch.finfo(torch.float32).tiny)
"""Smallest scale: below it the float32 reciprocal would overflow."""


class NotFinite(ValueError):
    """NaN or infinity where a range was to be taken."""


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of one site, on the granularity's grid."""

    format: Format
    scale: Tensor
    """float32, positive and finite; shape: the granularity's grid, ``[1, 1]`` when per tensor."""
    zero_point: Tensor
    """int32, same shape; zero for symmetric formats."""
    degenerate: int = 0
    """How many blocks had a range of width zero (their values are all zero and stay exact)."""


def choose_qparams(
    fmt: Format, lo: Tensor, hi: Tensor, tensor_scale: Tensor | None = None
) -> QParams:
    """Scale and zero point for the ranges ``[lo, hi]``, any shape; computed in float64.

    A block whose range has width zero holds only zeros; it gets scale 1, under which zero is
    exact, and is counted in ``degenerate``. ``tensor_scale`` (float64) is for formats that have one
    above the blocks'; by default it is taken from the ranges.

    Raises:
        NotFinite: a range holds NaN or infinity.
    """
    lo, hi = lo.double(), hi.double()
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        raise NotFinite("range is not finite")
    if isinstance(fmt, NvFp4):
        scale, zero_point = fmt.qparams(lo, hi, tensor_scale)
    else:
        scale, zero_point = fmt.qparams(lo, hi)
    empty = scale == 0
    scale = torch.where(empty, torch.ones_like(scale), scale.clamp(min=TINIEST_SCALE))
    return QParams(fmt, scale.float(), zero_point, degenerate=int(empty.sum()))
