"""Formats: the sets of values a quantized number may take.

A format is a frozen value. Its methods work on the *grid*, that is on ``u = x / scale``, so that
one arithmetic (`halfstep.quantize`) serves them all:

- a uniform format's grid is the integers from ``quant_min - zero_point`` to
  ``quant_max - zero_point``;
- a floating format's grid is its finite values;
- a codebook's grid is its table;
- a block format has the grid of its element, and a rule of its own for
  the scale that each block shares.
"""

from __future__ import annotations

from collections.abc import Mapping

from halfstep.formats.block import SCALE_RULES, Microscaling, NvFp4, microscaling
from halfstep.formats.codebook import BINARY, NF4, Codebook
from halfstep.formats.floating import (
    BF16,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    Floating,
)
from halfstep.formats.uniform import Uniform, integers
from halfstep.plugins import Known

Format = Uniform | Floating | Codebook | Microscaling | NvFp4

_NAMED: list[Format] = [
    BINARY,
    *(fmt for bits in range(2, 9) for fmt in integers(bits)),
    *(Uniform(f"uint{bits}", bits, 0, 2**bits - 1, symmetric=False) for bits in range(1, 9)),
    FP4_E2M1,
    FP6_E3M2,
    FP6_E2M3,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    BF16,
    NF4,
    *microscaling("mxfp4", FP4_E2M1),
    *microscaling("mxfp6_e3m2", FP6_E3M2),
    *microscaling("mxfp6_e2m3", FP6_E2M3),
    *microscaling("mxfp8_e4m3", FP8_E4M3),
    *microscaling("mxfp8_e5m2", FP8_E5M2),
    *microscaling("mxint8", Uniform("int8_full", 8, -128, 127, symmetric=True)),
    NvFp4("nvfp4", FP4_E2M1, 16),
]

FORMATS: Mapping[str, Format] = Known({f.name: f for f in _NAMED}, "halfstep.formats", Format)
"""Every format by the name that configs use. intN: symmetric restricted range (-127..127 for
int8); intN_full: symmetric over the full range (-128..127, scale amax/127.5); intN_asym and uintN:
with a zero point; mx…: the specification's floor rule for the scale, with _ceil, _even or _rceil
another one. Other packages add theirs as entry points of the group ``halfstep.formats``."""

__all__ = [
    "FORMATS", "SCALE_RULES", "Codebook", "Floating", "Format", "Microscaling", "NvFp4", "Uniform",
]  # fmt: skip
