"""Formats: the sets of values a quantized number may take.

A format is a frozen value. Its methods work on the *grid*, that is on ``u = x / scale``, so that
one arithmetic (`halfstep.quantize`) serves them all:

- a uniform format's grid is the integers from ``quant_min - zero_point`` to
  ``quant_max - zero_point``;
- a floating format's grid is its finite values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    scaled = True

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

    def gap(self, u: Tensor) -> Tensor:
        """Distance between the grid points around ``u``: one step everywhere."""
        return torch.ones_like(u)

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


@dataclass(frozen=True)
class Floating:
    """A small IEEE-like binary floating-point format, without infinities on the grid."""

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    """Explicit mantissa bits (the implicit leading one is not counted)."""
    largest: float
    """Largest finite value; larger inputs saturate to it."""
    storage: torch.dtype
    scaled: bool
    """True: a scale maps the calibrated range onto ``largest``. False: values are only cast."""

    symmetric = True

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; below it the gap is constant (subnormals)."""
        return 2 - (1 << (self.exponent_bits - 1))

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale ``amax / largest`` (float64; 1 for formats that are only cast), zero point 0."""
        amax = torch.maximum(lo.abs(), hi.abs())
        scale = amax / self.largest if self.scaled else torch.ones_like(amax)
        return scale, torch.zeros_like(lo, dtype=torch.int32)

    def limits(self, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the grid, as float32 of the zero point's shape."""
        top = torch.full_like(zero_point, 1, dtype=torch.float32) * self.largest
        return -top, top

    def round_(self, u: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
        """Moves ``u`` (float32) in place to the nearest grid point, ties to even, saturating.

        The 16-bit formats go through torch's cast. The smaller ones add and subtract 1.5 times a
        power of two whose float32 spacing is the local gap, so the hardware's own
        round-to-nearest-even does the work (a generalisation of the "magic number" rounding of
        Hacker's Delight, section 17): seven in-place passes, no table.
        """
        u.clamp_(lower, upper)  # type: ignore[arg-type]
        if self.bits == 16:
            return u.copy_(u.to(self.storage))
        magic = (u.view(torch.int32) & 0x7F800000).view(torch.float32)
        magic.clamp_(min=2.0**self.min_exponent).mul_(1.5 * 2.0 ** (23 - self.mantissa_bits))
        return u.add_(magic).sub_(magic)

    def gap(self, u: Tensor) -> Tensor:
        """Distance between neighbouring grid points in the binade of ``u``."""
        binade = (u.float().contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
        return binade.clamp_(min=2.0**self.min_exponent).mul_(2.0**-self.mantissa_bits)

    def grid(self) -> Tensor:
        """Every finite value, ascending, float64 (both zeros count once)."""
        per_binade = 2**self.mantissa_bits
        step = 2.0 ** (self.min_exponent - self.mantissa_bits)
        values = [i * step for i in range(per_binade)]
        exponent = self.min_exponent
        while (base := 2.0**exponent) <= self.largest:
            values += [base * (1 + i / per_binade) for i in range(per_binade)]
            exponent += 1
        positive = torch.tensor([v for v in values if v <= self.largest], dtype=torch.float64)
        return torch.cat([-positive[1:].flip(0), positive])

    def positive_edges(self, *, unsigned: bool) -> Tensor:
        """Borders of the quantization levels of ``|x|`` as fractions of the range, for entropy."""
        values = self.grid()
        values = values[values >= 0]
        midpoints = (values[1:] + values[:-1]) / 2
        ends = torch.tensor([0.0, self.largest], dtype=torch.float64)
        return torch.cat([ends[:1], midpoints, ends[1:]]) / self.largest


Format = Uniform | Floating


def _integers(bits: int) -> list[Uniform]:
    top = 2 ** (bits - 1)
    return [
        Uniform(f"int{bits}", bits, -(top - 1), top - 1, symmetric=True),
        Uniform(f"int{bits}_full", bits, -top, top - 1, symmetric=True),
        Uniform(f"int{bits}_asym", bits, -top, top - 1, symmetric=False),
    ]


_NAMED: list[Format] = [
    *(fmt for bits in range(2, 9) for fmt in _integers(bits)),
    Uniform("uint8", 8, 0, 255, symmetric=False),
    # OCP 8-bit floating point specification 1.0, tables 1 and 2.
    Floating("fp8_e4m3", 8, 4, 3, 448.0, torch.float8_e4m3fn, scaled=True),
    Floating("fp8_e5m2", 8, 5, 2, 57344.0, torch.float8_e5m2, scaled=True),
    Floating("fp16", 16, 5, 10, 65504.0, torch.float16, scaled=False),
    Floating("bf16", 16, 8, 7, 3.3895313892515355e38, torch.bfloat16, scaled=False),
]

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _NAMED}
"""Every format by the name that configs use. intN: symmetric restricted range (-127..127 for
int8); intN_full: symmetric over the full range (-128..127, scale amax/127.5); intN_asym: with a
zero point."""
