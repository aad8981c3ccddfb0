"""Activation quantization: static from a site's sketch, or dynamic from each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from halfstep.calibrators import parse_calibrator
from halfstep.formats import Format
from halfstep.observed import Sketched
from halfstep.qparams import QParams, choose_qparams
from halfstep.quantize import fake_quantize
from halfstep.scheme import Spec
from halfstep.sketch import Sketch


class ActivationQuantizer(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """Fake-quantizes an activation (float32); returns a new tensor."""
        ...

    def qparams_for(self, x: Tensor) -> QParams:
        """The qparams under which ``x`` is quantized, broadcastable against it."""
        ...


@dataclass(frozen=True, eq=False)
class StaticQuantizer:
    """One scale for the tensor, fixed at calibration."""

    qparams: QParams
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        lower, upper = self.qparams.format.limits(self.qparams.zero_point)
        # Python floats keep the hot path at four in-place passes without broadcasting.
        object.__setattr__(self, "_lower", float(lower))
        object.__setattr__(self, "_upper", float(upper))
        object.__setattr__(self, "_scale", float(self.qparams.scale))
        object.__setattr__(self, "_inverse", float(self.qparams.scale.reciprocal()))

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Fake-quantizes ``x``, into ``out`` where one is given."""
        fmt = self.qparams.format
        # Times one is a copy: formats that are only cast have scale 1.
        u = torch.mul(x, self._inverse, out=out)  # type: ignore[attr-defined]
        fmt.round_(u, self._lower, self._upper)  # type: ignore[attr-defined]
        return u.mul_(self._scale) if fmt.scaled else u  # type: ignore[attr-defined]

    def same_as(self, other: StaticQuantizer) -> bool:
        """True where both give the same numbers: equal format, scale and zero point."""
        return self is other or (
            self.qparams.format is other.qparams.format
            and torch.equal(self.qparams.scale, other.qparams.scale)
            and torch.equal(self.qparams.zero_point, other.qparams.zero_point)
        )

    def qparams_for(self, x: Tensor) -> QParams:
        shape = [1] * x.dim()
        return QParams(
            self.qparams.format,
            self.qparams.scale.reshape(shape),
            self.qparams.zero_point.reshape(shape),
        )


@dataclass(frozen=True, eq=False)
class DynamicQuantizer:
    """Each token by its own range, taken as it passes."""

    format: Format
    kind: str
    """The site's kind: it decides which axes make up a token."""

    notes: tuple[str, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.qparams_for(x))

    def qparams_for(self, x: Tensor) -> QParams:
        axes = [x.dim() - 1] if self.kind == "linear" else list(range(1, x.dim()))
        return choose_qparams(self.format, x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))


def static_quantizer(sketch: Sketch, spec: Spec) -> StaticQuantizer:
    """Calibrates an activation site from its sketch."""
    calibrator = parse_calibrator(spec.calibrator if spec.format.scaled else "minmax")
    chosen = calibrator(Sketched(sketch), spec.format)
    qparams = choose_qparams(spec.format, chosen.lo[:, None], chosen.hi[:, None])
    notes = list(chosen.notes)
    if sketch.lo == sketch.hi:
        notes.append(f"activation is constant at {sketch.lo:g} over the calibration data")
    return StaticQuantizer(qparams, tuple(notes))


def quantizer(kind: str, sketch: Sketch | None, spec: Spec) -> StaticQuantizer | DynamicQuantizer:
    """The quantizer of one activation site; static specs need its sketch."""
    if spec.granularity.dynamic and spec.format.scaled:
        return DynamicQuantizer(spec.format, kind)
    if sketch is None:
        if spec.format.scaled:
            raise ValueError("a static activation needs a sketch")
        one = torch.ones(1, 1)
        return StaticQuantizer(choose_qparams(spec.format, -one, one), ())
    return static_quantizer(sketch, spec)
