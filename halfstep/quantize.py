"""Quantize, dequantize and fake-quantize: applying qparams that were chosen elsewhere.

All three are the same few in-place passes over ``u = x * (1 / scale)``. The reciprocal is rounded
to float32, which makes the uniform formats bit-equal to ``torch.fake_quantize_per_*_affine``, the
sign of zero included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.formats import Codebook, Format, Uniform
from halfstep.qparams import QParams

_ZERO = torch.zeros(())


def scale_back_(u: Tensor, scale: Tensor | float) -> Tensor:
    """Multiplies grid points by their scale in place; integers never come out as minus zero.

    ``0 + scale * u`` costs what ``scale * u`` does, and is what torch's operators and
    dequantized codes give.
    """
    if isinstance(scale, float):
        return torch.add(_ZERO, u, alpha=scale, out=u)
    return u.mul_(scale).add_(0.0)


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Quantizes and dequantizes ``x`` (float32); qparams must broadcast against it.

    Returns a new tensor; ``x`` is not changed.
    """
    u = _to_grid(x, qparams)
    if not qparams.format.scaled:
        return u
    return scale_back_(u, qparams.scale) if has_one_zero(qparams.format) else u.mul_(qparams.scale)


def has_one_zero(fmt: Format) -> bool:
    """True for integers and tables: a value below zero that rounds to zero loses its sign."""
    return isinstance(getattr(fmt, "element", fmt), Uniform | Codebook)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """The codes of ``x``, in the format's storage dtype."""
    return qparams.format.encode(_to_grid(x, qparams), qparams.zero_point)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """The float32 values that codes stand for: ``scale * (code - zero_point)``."""
    return qparams.format.decode(codes, qparams.zero_point) * qparams.scale


def _to_grid(x: Tensor, qparams: QParams) -> Tensor:
    lower, upper = qparams.format.limits(qparams.zero_point)
    u = x * qparams.scale.reciprocal() if qparams.format.scaled else x.clone()
    return qparams.format.round_(u, lower, upper)
