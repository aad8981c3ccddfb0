"""Floating formats: small IEEE-like binary floating point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.formats.sizes import SCALE_BITS


@dataclass(frozen=True)
class Floating:
    """A small IEEE-like binary floating-point format, without infinities on the grid.

    Unlike the integers, it has two zeros; rounding keeps the sign.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    """Explicit mantissa bits (the implicit leading one is not counted)."""
    largest: float
    """Largest finite value; larger inputs saturate to it."""
    storage: torch.dtype
    """The torch dtype that holds one code; uint8 where torch has no type of these bits."""
    scaled: bool
    """True: a scale maps the calibrated range onto ``largest``. False: values are only cast."""

    symmetric: ClassVar[bool] = True
    block: ClassVar[int | None] = None
    tensor_scaled: ClassVar[bool] = False
    clips: ClassVar[bool] = False

    @property
    def block_bits(self) -> int:
        """Bits that each block needs beside its codes: its scale."""
        return SCALE_BITS if self.scaled else 0

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
        Hacker's Delight, section 17): nine in-place passes, no table.
        """
        u.clamp_(lower, upper)  # type: ignore[arg-type]
        if self.bits == 16:
            return u.copy_(u.to(self.storage))
        bits = u.view(torch.int32)
        sign = bits & -0x80000000
        magic = (bits & 0x7F800000).view(torch.float32)
        magic.clamp_(min=2.0**self.min_exponent).mul_(1.5 * 2.0 ** (23 - self.mantissa_bits))
        u.add_(magic).sub_(magic)
        bits.bitwise_or_(sign)  # what was rounded to zero keeps its sign
        return u

    def encode(self, u: Tensor, zero_point: Tensor) -> Tensor:
        """The codes of grid points ``u``: sign, exponent and mantissa, the sign topmost."""
        if self.storage != torch.uint8:
            return u.to(self.storage)
        bits = u.float().contiguous().view(torch.int32)
        magnitude = u.abs()
        exponent = ((bits >> 23) & 0xFF) - 127
        normal = ((exponent - self.min_exponent + 1) << self.mantissa_bits) | (
            (bits >> (23 - self.mantissa_bits)) & ((1 << self.mantissa_bits) - 1)
        )
        subnormal = (magnitude * 2.0 ** (self.mantissa_bits - self.min_exponent)).int()
        code = torch.where(exponent >= self.min_exponent, normal, subnormal)
        return (code | ((bits < 0).int() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """The grid points (float32) of codes."""
        if self.storage != torch.uint8:
            return codes.float()
        code = codes.int()
        mantissa = (code & ((1 << self.mantissa_bits) - 1)).float()
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        fraction = mantissa * 2.0**-self.mantissa_bits + (exponent > 0)
        value = torch.ldexp(fraction, exponent.clamp(min=1) - 1 + self.min_exponent)
        return torch.where((code >> (self.bits - 1)) == 1, -value, value)

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


# OCP 8-bit floating point specification 1.0, tables 1 and 2.
FP8_E4M3 = Floating("fp8_e4m3", 8, 4, 3, 448.0, torch.float8_e4m3fn, scaled=True)
FP8_E5M2 = Floating("fp8_e5m2", 8, 5, 2, 57344.0, torch.float8_e5m2, scaled=True)
# OCP microscaling formats (MX) specification 1.0, section 5.3.
FP6_E3M2 = Floating("fp6_e3m2", 6, 3, 2, 28.0, torch.uint8, scaled=True)
FP6_E2M3 = Floating("fp6_e2m3", 6, 2, 3, 7.5, torch.uint8, scaled=True)
FP4_E2M1 = Floating("fp4_e2m1", 4, 2, 1, 6.0, torch.uint8, scaled=True)
FP16 = Floating("fp16", 16, 5, 10, 65504.0, torch.float16, scaled=False)
BF16 = Floating("bf16", 16, 8, 7, 3.3895313892515355e38, torch.bfloat16, scaled=False)
