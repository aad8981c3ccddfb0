"""Activation quantization: static from what calibration observed, or dynamic from the tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.calibrators import parse_calibrator
from halfstep.formats import Format, NvFp4, Uniform
from halfstep.granularity import PerPosition, PerToken, PerTokenBlock
from halfstep.observation import Observation
from halfstep.observed import Sketched
from halfstep.operators import Operand
from halfstep.qparams import QParams, choose_qparams
from halfstep.quantize import fake_quantize, scale_back_
from halfstep.scheme import Spec


@dataclass(frozen=True, eq=False)
class StaticQuantizer:
    """One scale for the tensor, fixed at calibration."""

    qparams: QParams
    """Scale and zero point of shape ``[1, 1]``."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lower, upper = self.qparams.format.limits(self.qparams.zero_point)
        # Python floats keep the hot path at four in-place passes without broadcasting.
        object.__setattr__(self, "_lower", float(lower))
        object.__setattr__(self, "_upper", float(upper))
        object.__setattr__(self, "_scale", float(self.qparams.scale))
        object.__setattr__(self, "_inverse", float(self.qparams.scale.reciprocal()))
        object.__setattr__(self, "_zero_point", int(self.qparams.zero_point))

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Fake-quantizes ``x``, into ``out`` where one is given."""
        return scale_back_(self.to_grid(x, out), self.scale, self.qparams.format)

    def to_grid(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The grid points (float32) that stand for ``x``: for uniform formats the codes less their
        zero point."""
        # Times one is a copy: formats that are only cast have scale 1.
        u = torch.mul(x, self._inverse, out=out)  # type: ignore[attr-defined]
        return self.qparams.format.round_(u, self._lower, self._upper)  # type: ignore[attr-defined]

    @property
    def scale(self) -> float:
        return self._scale  # type: ignore[attr-defined, no-any-return]

    @property
    def zero_point(self) -> int:
        return self._zero_point  # type: ignore[attr-defined, no-any-return]

    @property
    def unsigned_shift(self) -> int:
        """What makes uint8 of integer codes, which kernels are fastest with: 128 where signed."""
        fmt = self.qparams.format
        assert isinstance(fmt, Uniform)
        return 128 if fmt.quant_min < 0 else 0

    @property
    def unsigned_zero_point(self) -> int:
        """Of integer codes as uint8."""
        return self.zero_point + self.unsigned_shift

    def same_as(self, other: StaticQuantizer) -> bool:
        """True where both give the same numbers: equal format, scale and zero point."""
        return self is other or (
            self.qparams.format is other.qparams.format
            and self.scale == other.scale
            and self.zero_point == other.zero_point
        )

    def qparams_for(self, x: Tensor) -> QParams:
        shape = [1] * x.dim()
        return QParams(
            self.qparams.format,
            self.qparams.scale.reshape(shape),
            self.qparams.zero_point.reshape(shape),
        )


@dataclass(frozen=True, eq=False)
class PositionQuantizer:
    """A scale for each token position, fixed at calibration."""

    qparams: QParams
    """Scale and zero point of shape ``[positions + 1]``: the last is for positions beyond."""
    operand: Operand
    notes: tuple[str, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.qparams_for(x))

    def qparams_for(self, x: Tensor) -> QParams:
        axis = position_axis(x, self.operand)
        count = 1 if axis is None else x.shape[axis]
        index = torch.arange(count).clamp(max=len(self.qparams.scale) - 1)
        shape = [1] * x.dim()
        if axis is not None:
            shape[axis] = count
        return QParams(
            self.qparams.format,
            self.qparams.scale[index].reshape(shape),
            self.qparams.zero_point[index].reshape(shape),
        )


@dataclass(frozen=True, eq=False)
class TokenQuantizer:
    """Each token by its own range, taken as it passes."""

    format: Format
    operand: Operand
    notes: tuple[str, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.qparams_for(x))

    def qparams_for(self, x: Tensor) -> QParams:
        axes = [self.operand.axis]
        if self.operand.whole_example:
            axes = [a - x.dim() for a in range(x.dim()) if a - x.dim() != self.operand.batch]
        return choose_qparams(self.format, x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))


@dataclass(frozen=True, eq=False)
class BlockQuantizer:
    """Each block of consecutive values along the accumulator by its own range, as it passes."""

    format: Format
    operand: Operand
    size: int
    tensor_scale: Tensor | None = None
    """float64 scalar for formats that have one; fixed at calibration."""
    notes: tuple[str, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.qparams_for(x))

    def qparams_for(self, x: Tensor) -> QParams:
        last = x.movedim(self.operand.axis, -1)
        length = last.shape[-1]
        short = -length % self.size
        # Every range holds zero, so padding with zeros changes none.
        padded = F.pad(last, (0, short))
        padded = padded.reshape(*padded.shape[:-1], -1, self.size)
        chosen = choose_qparams(
            self.format, padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0),
            self.tensor_scale,
        )  # fmt: skip

        def spread(values: Tensor) -> Tensor:
            wide = values.repeat_interleave(self.size, dim=-1)[..., :length]
            return wide.movedim(-1, self.operand.axis)

        return QParams(self.format, spread(chosen.scale), spread(chosen.zero_point))


ActivationQuantizer = StaticQuantizer | PositionQuantizer | TokenQuantizer | BlockQuantizer


@dataclass(frozen=True, eq=False)
class TreatedActivation:
    """What happens to one activation before it enters its product."""

    operand: Operand
    quantizer: ActivationQuantizer | None
    divisor: Tensor | None = None
    """float32, one a channel; a correction moved these factors into the weight."""

    def divided(self, x: Tensor) -> Tensor:
        """``x`` with each channel divided by its divisor; ``x`` itself where there is none."""
        if self.divisor is None:
            return x
        shape = [1] * x.dim()
        shape[self.operand.axis] = len(self.divisor)
        return x / self.divisor.reshape(shape)


def position_axis(x: Tensor, operand: Operand) -> int | None:
    """The axis that counts tokens, or None where the input has none: a convolution's whole example
    is one token, and the rows of a matrix ``[examples, features]`` are examples."""
    if operand.whole_example or operand.batch is None:
        return None
    left = [a for a in range(-1, -x.dim() - 1, -1) if a not in (operand.axis, operand.batch)]
    return x.dim() + left[0] if left else None


def quantizer(operand: Operand, observation: Observation | None, spec: Spec) -> ActivationQuantizer:
    """The quantizer of one activation; static specs need what calibration observed."""
    fmt = spec.format
    if spec.needs_sketch and observation is None:
        raise ValueError("a static activation needs an observation")
    if isinstance(fmt, NvFp4):
        assert observation is not None
        scale = fmt.tensor_scale(torch.tensor(observation.sketch.amax, dtype=torch.float64))
        return BlockQuantizer(fmt, operand, fmt.block, scale)
    if fmt.block is not None:
        return BlockQuantizer(fmt, operand, fmt.block)
    if not fmt.scaled:
        one = torch.ones(1, 1)
        return StaticQuantizer(choose_qparams(fmt, -one, one))
    if isinstance(spec.granularity, PerToken):
        return TokenQuantizer(fmt, operand)
    if isinstance(spec.granularity, PerTokenBlock):
        return BlockQuantizer(fmt, operand, spec.granularity.size)
    assert observation is not None
    if isinstance(spec.granularity, PerPosition):
        return _by_position(operand, observation, fmt)
    return _static(observation, spec)


def _static(observation: Observation, spec: Spec) -> StaticQuantizer:
    chosen = parse_calibrator(spec.calibrator)(Sketched(observation), spec.format)
    qparams = choose_qparams(spec.format, chosen.lo[:, None], chosen.hi[:, None])
    return StaticQuantizer(qparams, (*chosen.notes, *observation.notes))


def _by_position(operand: Operand, observation: Observation, fmt: Format) -> PositionQuantizer:
    if observation.positions is None:
        raise ValueError("positions were not observed")
    lo, hi = observation.positions
    lo, hi = torch.cat([lo, lo.min()[None]]), torch.cat([hi, hi.max()[None]])
    notes = observation.notes
    if len(lo) == 2:
        notes = (*notes, "input has one position: a static scale per token is one per tensor")
    return PositionQuantizer(choose_qparams(fmt, lo, hi), operand, notes)
