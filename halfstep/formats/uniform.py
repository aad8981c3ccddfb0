"""Uniform formats: equally spaced levels, as integers have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.formats.sizes import SCALE_BITS, ZERO_POINT_BITS


@dataclass(frozen=True)
class Uniform:
    """Equally spaced levels: ``x ~ scale * (code - zero_point)``."""

    name: str
    bits: int
    quant_min: int
    """Smallest code."""
    quant_max: int
    """Largest code."""
    symmetric: bool
    """True: zero_point is 0 and the range is mirrored around it. False: any range that holds 0."""

    scaled: ClassVar[bool] = True
    block: ClassVar[int | None] = None
    tensor_scaled: ClassVar[bool] = False
    clips: ClassVar[bool] = False

    @property
    def block_bits(self) -> int:
        """Bits that each block needs beside its codes: a scale, and a zero point where shifted."""
        return SCALE_BITS + (0 if self.symmetric else ZERO_POINT_BITS)

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds one code."""
        return torch.uint8 if self.quant_max > 127 else torch.int8

    @property
    def half_width(self) -> float:
        """Steps from the centre of the range to its end: the divisor of a symmetric scale.

        Restricted int8 divides amax by 127, full-range int8 by 127.5.
        """
        return (self.quant_max - self.quant_min) / 2

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (float64) and zero point (int32) for ranges ``[lo, hi]`` (float64, any shape).

        Symmetric formats use ``max(|lo|, |hi|)``; asymmetric ones widen the range to hold zero
        (so that zero is exact) as in Jacob et al. 2018, section 2.1. A range of width zero gives
        scale 0, which `halfstep.qparams.choose` reports and replaces.
        """
        if self.symmetric:
            amax = torch.maximum(lo.abs(), hi.abs())
            return amax / self.half_width, torch.zeros_like(lo, dtype=torch.int32)
        lo, hi = lo.clamp(max=0.0), hi.clamp(min=0.0)
        scale = (hi - lo) / (self.quant_max - self.quant_min)
        shift = torch.where(scale > 0, lo / scale.clamp(min=1e-300), torch.zeros_like(lo))
        zero_point = (self.quant_min - shift).round().clamp(self.quant_min, self.quant_max)
        return scale, zero_point.to(torch.int32)

    def limits(self, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the grid, as float32 of the zero point's shape."""
        return (self.quant_min - zero_point).float(), (self.quant_max - zero_point).float()

    def round_(self, u: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
        """Moves ``u`` (float32) in place to the nearest grid point, ties to even, saturating."""
        return u.round_().clamp_(lower, upper)  # type: ignore[arg-type]

    def encode(self, u: Tensor, zero_point: Tensor) -> Tensor:
        """The codes of grid points ``u``."""
        return (u + zero_point).to(self.storage)

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """The grid points (float32) of codes."""
        return codes.float() - zero_point

    def gap(self, u: Tensor) -> Tensor:
        """Distance between the grid points around ``u``: one step everywhere, for any shape."""
        return u.new_ones(())

    def grid(self) -> Tensor:
        """Every value of the grid at zero point 0, ascending, float64."""
        return torch.arange(self.quant_min, self.quant_max + 1, dtype=torch.float64)

    def positive_edges(self, *, unsigned: bool) -> Tensor:
        """Borders of the quantization levels of ``|x|`` as fractions of the range, for entropy.

        ``2**(bits - 1)`` equal levels, twice as many where one sign only occurs and the format
        can shift (pytorch-quantization's ``_compute_amax_entropy``).
        """
        levels = 2**self.bits if unsigned and not self.symmetric else 2 ** (self.bits - 1)
        return torch.linspace(0, 1, levels + 1, dtype=torch.float64)


def integers(bits: int) -> list[Uniform]:
    """The signed formats of some bits: restricted range, full range, with a zero point."""
    top = 2 ** (bits - 1)
    return [
        Uniform(f"int{bits}", bits, -(top - 1), top - 1, symmetric=True),
        Uniform(f"int{bits}_full", bits, -top, top - 1, symmetric=True),
        Uniform(f"int{bits}_asym", bits, -top, top - 1, symmetric=False),
    ]
