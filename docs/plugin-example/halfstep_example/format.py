"""A format: powers of two."""

from __future__ import annotations

from halfstep.formats import Codebook

_LEVELS = tuple(2.0**-i for i in range(7))
OCTAVE4 = Codebook("octave4", 4, (*(-v for v in _LEVELS), 0.0, *reversed(_LEVELS)))
"""``±1, ±1/2, … ±1/64`` and 0: a logarithmic code of 15 levels."""
