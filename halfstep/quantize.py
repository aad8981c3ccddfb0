"""Quantize, dequantize and fake-quantize: applying qparams that were chosen elsewhere.

All three are the same few in-place passes over ``u = x * (1 / scale)``. The reciprocal is rounded
to float32, which makes the uniform formats bit-equal to ``torch.fake_quantize_per_*_affine``.
"""

from __future__ import annotations

from torch import Tensor

from halfstep.qparams import QParams


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Quantizes and dequantizes ``x`` (float32); qparams must broadcast against it.

    Returns a new tensor; ``x`` is not changed.
    """
    u = _to_grid(x, qparams)
    return u.mul_(qparams.scale) if qparams.format.scaled else u


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """The codes of ``x``, in the format's storage dtype."""
    u = _to_grid(x, qparams)
    return u.add_(qparams.zero_point).to(qparams.format.storage)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """The float32 values that codes stand for: ``scale * (code - zero_point)``."""
    return (codes.float() - qparams.zero_point) * qparams.scale


def _to_grid(x: Tensor, qparams: QParams) -> Tensor:
    lower, upper = qparams.format.limits(qparams.zero_point)
    u = x * qparams.scale.reciprocal() if qparams.format.scaled else x.clone()
    return qparams.format.round_(u, lower, upper)
