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


def scale_back_(u: Tensor, scale: Tensor | float, fmt: Format) -> Tensor:
    """Multiplies a format's grid points by their scale in place.

    Formats that are only cast have none. Integers and tables have one zero, so a value below zero
    that rounds to it must lose its sign: ``0 + scale * u`` does so, costs what ``scale * u`` does,
    and is what torch's operators and dequantized codes give.
    """
    if not fmt.scaled:
        return u
    if not isinstance(getattr(fmt, "element", fmt), Uniform | Codebook):
        return u.mul_(scale)
    if isinstance(scale, float):
        return torch.add(_ZERO, u, alpha=scale, out=u)
    return u.mul_(scale).add_(0.0)


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Quantizes and dequantizes ``x`` (float32); qparams must broadcast against it.

    Returns a new tensor; ``x`` is not changed.
    """
    return scale_back_(_to_grid(x, qparams), qparams.scale, qparams.format)


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
