"""Activations as 8-bit codes, and as the whole numbers that these stand for.

Both are the same numbers: codes less their zero point are what `StaticQuantizer.to_grid` gives.
torch has an operator that scales, rounds and narrows in one pass. It is deprecated, and adds zero
points before it rounds: so it is tried before use, and only where the zero point is 0.

Kernels want unsigned codes, and are fastest with the zero point 0. Signed codes are shifted by 128;
but where no value lies below zero, as behind a ReLU, they are unsigned ones as they stand.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from halfstep.activations import StaticQuantizer
from halfstep.formats import FORMATS, Uniform
from halfstep.identity import Identity
from halfstep.qparams import QParams


class Coded:
    """The last activation of some shape as grid points and as codes, each made when asked for. A
    tensor that enters two products under equal qparams is quantized once."""

    def __init__(self, *, channels_last: bool) -> None:
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._held: tuple[Identity, StaticQuantizer] | None = None
        self._grid: Tensor | None = None
        self._codes: dict[int, Tensor] = {}
        self._buffer: Tensor | None = None
        self.broken = False
        """It holds NaN, for which there is no code."""
        self.zero_point = 0
        """Of the unsigned codes that cost least."""

    def hold(self, x: Tensor, quantizer: StaticQuantizer) -> None:
        """Takes ``x`` (float32), unless that is what it holds."""
        if self._held and self._held[0].still(x) and self._held[1].same_as(quantizer):
            return
        # Tensors of inference mode cannot be known again.
        self._held = None if x.is_inference() else (Identity.of(x), quantizer)
        self._grid = None
        self._codes.clear()
        lowest = x.amin().item() if x.numel() else 0.0  # NaN where any value is
        self.broken = lowest != lowest
        plain = lowest >= 0 and quantizer.zero_point == 0
        self.zero_point = 0 if plain else quantizer.unsigned_zero_point

    def grid(self, x: Tensor, quantizer: StaticQuantizer) -> Tensor:
        """What it holds as whole numbers (float32): codes less their zero point."""
        if self._grid is None:
            if self._buffer is None:  # used again for every activation of this shape
                self._buffer = torch.empty_like(x, memory_format=self._layout)
            self._grid = quantizer.to_grid(x, out=self._buffer)
        return self._grid

    def unsigned(self, x: Tensor, quantizer: StaticQuantizer, zero_point: int) -> Tensor:
        """What it holds as codes (uint8) at ``zero_point``: that of the quantizer's unsigned codes,
        or its own."""
        if zero_point not in self._codes:
            if quantizer.zero_point == 0 and at_once_is_exact():
                x = x.contiguous(memory_format=self._layout)
                made = at_once(x, quantizer, zero_point)
            else:
                made = in_passes(self.grid(x, quantizer), quantizer, zero_point)
            self._codes[zero_point] = made
        return self._codes[zero_point]


def in_passes(grid: Tensor, quantizer: StaticQuantizer, zero_point: int) -> Tensor:
    """Grid points as unsigned codes. Conversion to int8 takes an eighth of the time of one to
    uint8."""
    if _as_they_stand(quantizer, zero_point):
        return grid.to(torch.int8).view(torch.uint8)
    shift = zero_point - 128
    codes = (grid.add(shift) if shift else grid).to(torch.int8)
    return codes.view(torch.uint8).bitwise_xor_(128)


def at_once(x: Tensor, quantizer: StaticQuantizer, zero_point: int) -> Tensor:
    """``x`` as unsigned codes, by torch's operator; the quantizer's own zero point is 0."""
    fmt = quantizer.qparams.format
    assert isinstance(fmt, Uniform)
    signed = fmt.quant_min < 0
    wide, narrow = (torch.qint8, torch.int8) if signed else (torch.quint8, torch.uint8)
    quantized = torch.quantize_per_tensor(x, quantizer.scale, 0, wide)
    # Its bytes as they lie: ``int_repr`` would copy them, slowly where channels are last.
    codes = torch.empty(0, dtype=narrow).set_(
        quantized.untyped_storage(), 0, quantized.shape, quantized.stride()
    )
    if _as_they_stand(quantizer, zero_point):
        return (codes.clamp_(max=fmt.quant_max) if fmt.quant_max < 127 else codes).view(torch.uint8)
    if fmt.bits < 8 or fmt.quant_min == -127:
        codes.clamp_(fmt.quant_min, fmt.quant_max)
    return codes.view(torch.uint8).bitwise_xor_(128) if signed else codes


def _as_they_stand(quantizer: StaticQuantizer, zero_point: int) -> bool:
    """True where signed codes are taken for unsigned ones, since none is below zero."""
    return quantizer.unsigned_shift != 0 and zero_point == 0


@lru_cache(maxsize=1)
def at_once_is_exact() -> bool:
    """Whether torch's operator gives the codes of the passes here: on ties and their neighbours,
    far beyond the range, on infinities and on the smallest numbers, at several scales."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is deprecated, once
            return all(
                torch.equal(
                    at_once(x, quantizer, zero_point),
                    in_passes(quantizer.to_grid(x), quantizer, zero_point),
                )
                for x, quantizer, zero_point in _trials()
            )
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


def _trials() -> Iterator[tuple[Tensor, StaticQuantizer, int]]:
    whole = torch.arange(-300, 300).float() + 0.5
    none = torch.zeros(1, 1, dtype=torch.int32)
    for name, scale in itertools.product(
        ("int8", "int8_full", "uint8", "int4"), (1.0, 0.0123, 3.7e-20, 1.9e20)
    ):
        quantizer = StaticQuantizer(QParams(FORMATS[name], torch.full((1, 1), scale), none))
        ties = whole * scale
        inf = torch.full_like(ties, torch.inf)
        x = torch.cat(
            [ties, ties.nextafter(inf), ties.nextafter(-inf), ties * 1e10, inf, -inf, whole * 1e-41]
        )
        yield x, quantizer, quantizer.unsigned_zero_point
        yield x.clamp(min=0), quantizer, 0
