"""Block formats: elements of a scalar format that share a scale of few bits, block by block.

The scale is not ``amax / largest`` but what a rule makes of it, and some rules clip the largest
values of a block by design (OCP MX 1.0, section 6.3). The certificate counts those apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.formats.floating import FP4_E2M1, FP8_E4M3, Floating
from halfstep.formats.uniform import Uniform

E8M0_MIN, E8M0_MAX = -127, 127
"""Exponents that an E8M0 scale can hold (OCP MX 1.0, section 5.4.1; 255 is NaN)."""


def _exponent(x: Tensor) -> Tensor:
    """``floor(log2(x))`` of positive float64, exactly."""
    return torch.frexp(x).exponent - 1


def _floor(amax: Tensor, element: Floating | Uniform) -> Tensor:
    """OCP MX 1.0, section 6.3: ``floor(log2 amax) - emax``. Clips what lies above the largest."""
    return _exponent(amax) - _emax(element)


def _ceil(amax: Tensor, element: Floating | Uniform) -> Tensor:
    """``ceil(log2 amax) - emax``: never clips, and leaves up to a bit of range unused."""
    mantissa, exponent = torch.frexp(amax)
    return exponent - (mantissa == 0.5).int() - _emax(element)


def _even(amax: Tensor, element: Floating | Uniform) -> Tensor:
    """Floor, after ``amax`` was rounded to the element's mantissa bits: clips only what would
    have been rounded down to the largest value anyway or little more (Microsoft's microxcaling)."""
    mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1)
    carries = mantissa >= 1.0 - 2.0 ** -(_mantissa_bits(element) + 2)
    return exponent - 1 + carries.int() - _emax(element)


def _rceil(amax: Tensor, element: Floating | Uniform) -> Tensor:
    """``ceil(log2(amax / largest))``: the smallest power of two that does not clip (NVIDIA's)."""
    mantissa, exponent = torch.frexp(amax / _largest(element))
    return exponent - (mantissa == 0.5).int()


Rule = Callable[[Tensor, Floating | Uniform], Tensor]
SCALE_RULES: dict[str, Rule] = {"floor": _floor, "ceil": _ceil, "even": _even, "rceil": _rceil}
"""From a block's largest magnitude (float64, positive) to the exponent of its scale."""


def _largest(element: Floating | Uniform) -> float:
    """Largest value of an element; MX integers carry an implied factor of 2**-(bits - 2)."""
    if isinstance(element, Floating):
        return element.largest
    return element.quant_max * 2.0 ** (2 - element.bits)


def _emax(element: Floating | Uniform) -> int:
    """Exponent of the largest value: 8 for E4M3, 15 for E5M2, 2 for E2M1, 0 for INT8."""
    return int(_exponent(torch.tensor(_largest(element), dtype=torch.float64)))


def _mantissa_bits(element: Floating | Uniform) -> int:
    return element.mantissa_bits if isinstance(element, Floating) else element.bits - 2


@dataclass(frozen=True)
class _Block:
    name: str
    element: Floating | Uniform
    block: int
    """How many consecutive values along the accumulator share a scale."""

    scaled: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True

    @property
    def bits(self) -> int:
        """Bits of one element, its share of the scale not counted."""
        return self.element.bits

    @property
    def storage(self) -> torch.dtype:
        return self.element.storage

    def limits(self, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the grid, as float32 of the zero point's shape."""
        return self.element.limits(zero_point)

    def round_(self, u: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
        """Moves ``u`` (float32) in place to the nearest grid point, ties to even, saturating."""
        return self.element.round_(u, lower, upper)

    def encode(self, u: Tensor, zero_point: Tensor) -> Tensor:
        """The codes of grid points ``u``."""
        return self.element.encode(u, zero_point)

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """The grid points (float32) of codes."""
        return self.element.decode(codes, zero_point)

    def gap(self, u: Tensor) -> Tensor:
        """Distance between the grid points around ``u``."""
        return self.element.gap(u)

    def grid(self) -> Tensor:
        """Every value of the grid, ascending, float64."""
        return self.element.grid()

    def positive_edges(self, *, unsigned: bool) -> Tensor:
        """Borders of the levels of ``|x|`` as fractions of the range, for entropy."""
        return self.element.positive_edges(unsigned=unsigned)


@dataclass(frozen=True)
class Microscaling(_Block):
    """An OCP MX format: a power of two (E8M0) for every block of 32."""

    rule: str

    block_bits: ClassVar[int] = 8
    tensor_scaled: ClassVar[bool] = False

    @property
    def clips(self) -> bool:
        """True where the scale rule may leave values more than half a gap out of range.

        The even rule does so for E4M3 alone, whose largest mantissa stands for NaN.
        """
        full = (2.0 - 2.0 ** -_mantissa_bits(self.element)) * 2.0 ** _emax(self.element)
        short = isinstance(self.element, Floating) and self.element.largest < full
        return self.rule == "floor" or (self.rule == "even" and short)

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """A power-of-two scale (float64; 0 for a block of zeros), zero point 0."""
        amax = torch.maximum(lo.abs(), hi.abs())
        exponent = SCALE_RULES[self.rule](amax, self.element).clamp(E8M0_MIN, E8M0_MAX)
        if isinstance(self.element, Uniform):
            exponent = exponent + 2 - self.element.bits
        scale = torch.ldexp(torch.ones_like(amax), exponent)
        return torch.where(amax > 0, scale, 0.0), torch.zeros_like(lo, dtype=torch.int32)


@dataclass(frozen=True)
class NvFp4(_Block):
    """NVIDIA's NVFP4: E2M1 elements, an E4M3 scale for every block of 16, one float32 scale for
    the tensor, ``amax / (6 * 448)``, which maps the largest block scale onto E4M3's largest."""

    block_bits: ClassVar[int] = 8
    tensor_scaled: ClassVar[bool] = True
    clips: ClassVar[bool] = True  # a block scale that was rounded down leaves its amax outside
    smallest_block_scale: ClassVar[float] = 2.0**-9

    def tensor_scale(self, amax: Tensor) -> Tensor:
        """The tensor's own scale (float64), 1 for a tensor of zeros."""
        scale = amax.double() / (FP4_E2M1.largest * FP8_E4M3.largest)
        return torch.where(scale > 0, scale.float().double(), 1.0)

    def qparams(
        self, lo: Tensor, hi: Tensor, tensor_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Block scale times tensor scale (float64; 0 for a block of zeros), zero point 0.

        ``tensor_scale`` defaults to that of the largest range given: the whole tensor's.
        """
        amax = torch.maximum(lo.abs(), hi.abs())
        whole = self.tensor_scale(amax.max()) if tensor_scale is None else tensor_scale
        wanted = (amax / FP4_E2M1.largest / whole).float()
        ends = FP8_E4M3.limits(torch.zeros((), dtype=torch.int32))
        block = FP8_E4M3.round_(wanted, *ends).clamp_(min=self.smallest_block_scale)
        return torch.where(amax > 0, block.double() * whole, 0.0), torch.zeros_like(
            lo, dtype=torch.int32
        )


def microscaling(name: str, element: Floating | Uniform) -> list[Microscaling]:
    """One element under all four scale rules; the specification's own has the plain name."""
    return [
        Microscaling(name if rule == "floor" else f"{name}_{rule}", element, 32, rule)
        for rule in SCALE_RULES
    ]
