"""Weight quantization: from a site's exact weight and a spec to codes, qparams and values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.calibrators import parse_calibrator
from halfstep.corrections import AdaRound, Awq, Correction, Gptq
from halfstep.corrections.awq import spread_over_rows
from halfstep.formats import Format, Uniform
from halfstep.formats.sizes import SCALE_BITS
from halfstep.granularity import (
    PerAxis,
    PerBlock,
    PerGroup,
    PerTensor,
    expand,
    from_blocks,
    grid_shape,
    to_blocks,
)
from halfstep.layout import Layout, rows_of
from halfstep.moments import Moments
from halfstep.observed import Exact
from halfstep.qparams import QParams, choose_qparams
from halfstep.quantize import fake_quantize, quantize
from halfstep.scheme import Spec


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight under one spec. All matrices are ``[out, reduction]``, float32."""

    spec: Spec
    qparams: QParams
    """On the granularity's grid over the matrix."""
    target: Tensor
    """What was rounded: the weight, scaled or compensated where a correction did so."""
    of: str
    """What the target is, in words."""
    rounded: Tensor
    """The grid points that stand for it, dequantized."""
    values: Tensor
    """What enters the products, in the weight's own shape."""
    gaps: float
    """The bound, in gaps of the grid: half a gap, one where the rounding was learned."""
    notes: tuple[str, ...]
    scaling: Tensor | None = None
    """What the columns were multiplied by before rounding, broadcast against the matrix."""
    output_error: tuple[float, float] | None = None
    """Relative mean squared output error over the calibration data: rounded to nearest, and as it
    is here. None where no correction was applied."""

    def broadcast(self) -> QParams:
        """The qparams made broadcastable against the matrix."""
        return _broadcast(self.spec, self.qparams, self.target)

    def codes(self) -> Tensor:
        """The integer (or small float) codes of the matrix."""
        return quantize(self.rounded, self.broadcast())

    def by_row(self) -> tuple[Tensor, Tensor] | None:
        """Codes in the weight's own shape, and the scale (float32 ``[out]``) of each index of its
        first axis: what integer kernels take. None where other scales are needed, or zero points,
        or where a correction left the values off the grid."""
        shape, scale = self.values.shape, self.qparams.scale
        whole = isinstance(self.spec.format, Uniform) and self.spec.format.symmetric
        if not whole or self.scaling is not None or len(self.rounded) != shape[0]:
            return None
        if scale.shape[1] != 1 or len(scale) not in (1, shape[0]):
            return None
        codes = self.codes().reshape(shape)
        scale = scale.reshape(-1).expand(shape[0]).contiguous()
        # An operation that reads the weight another way round has other rows.
        column = scale.reshape(-1, *[1] * (len(shape) - 1))
        return (codes, scale) if torch.equal(codes * column + 0.0, self.values) else None


def packed_bits(shape: tuple[int, int], spec: Spec) -> int:
    """Bits at rest of a weight ``[out, reduction]``: codes packed without gaps, and what each block
    needs beside them (scale, zero point), and the tensor's own scale where there is one."""
    codes = shape[0] * shape[1] * spec.format.bits
    if not spec.format.scaled:
        return codes
    blocks = math.prod(grid_shape(shape, _block_size(spec, shape)))
    whole = SCALE_BITS if spec.format.tensor_scaled else 0
    return codes + blocks * spec.format.block_bits + whole


def packed_bytes(shape: tuple[int, int], spec: Spec) -> int:
    """`packed_bits` in whole bytes."""
    return math.ceil(packed_bits(shape, spec) / 8)


def quantize_weight(
    weight: Tensor,
    spec: Spec,
    layout: Layout | None = None,
    corrections: tuple[Correction, ...] = (),
    moments: Moments | None = None,
    *,
    rewritten: bool = False,
) -> QuantizedWeight:
    """Calibrates, corrects and quantizes one weight (float32, finite).

    Args:
        layout: how the weight becomes a matrix; its first axis counts outputs by default.
        corrections: of stages ``scale`` and ``rounding``; they need ``moments``.
        rewritten: true where ``weight`` is what a rewrite made of the model's own.
    """
    layout = layout or rows_of(weight.shape, (0,))
    matrix = layout.matrix(weight).contiguous()
    notes: list[str] = []
    changes = ["scaled"] if rewritten else []
    scaling: Tensor | None = None
    target = matrix
    used = [c for c in corrections if isinstance(c, Awq | Gptq | AdaRound)]
    if used and moments is None:
        notes.append(f"{used[0].name} does not apply: no inputs meet this weight row by row")
        used = []
    for correction in used:
        if isinstance(correction, Awq):
            assert moments is not None
            factors, alpha = correction.search(
                matrix, moments, lambda m: fake_quantize(m, _chosen(m, spec)[1])
            )
            moments = moments.divided(factors)
            scaling = spread_over_rows(factors, matrix)
            target = matrix * scaling
            changes.append("scaled")
            notes.append(f"awq chose alpha {alpha:g}")
    qparams, broadcast, chosen_notes = _chosen(target, spec)
    notes += chosen_notes
    rounded, gaps = fake_quantize(target, broadcast), 0.5
    nearest = rounded
    for correction in used:
        if isinstance(correction, Gptq | AdaRound):
            assert moments is not None
            rounded, target = _by_group(correction, target, broadcast, moments)
            gaps = 0.5 if isinstance(correction, Gptq) else 1.0
            changes += ["compensated"] if isinstance(correction, Gptq) else []
    values = rounded if scaling is None else rounded / scaling
    errors = None
    if used:
        assert moments is not None
        errors = _output_errors(matrix, spec, nearest, rounded, scaling, moments)
    return QuantizedWeight(
        spec,
        qparams,
        target,
        " ".join([*dict.fromkeys(changes), "weight"]),
        rounded,
        layout.weight(values, weight.shape).contiguous(),
        gaps,
        tuple(notes),
        scaling,
        errors,
    )


def _chosen(matrix: Tensor, spec: Spec) -> tuple[QParams, QParams, list[str]]:
    """Qparams of a matrix on the granularity's grid, the same broadcast, and what to know of it."""
    shape = (matrix.shape[0], matrix.shape[1])
    block = _block_size(spec, shape)
    notes: list[str] = []
    lows, highs = [], []
    calibrator = parse_calibrator(spec.calibrator if _calibrated(spec.format) else "minmax")
    for blocks in to_blocks(matrix, block):
        found = calibrator(Exact(blocks), spec.format)
        lows.append(found.lo)
        highs.append(found.hi)
        notes += found.notes
    qparams = choose_qparams(
        spec.format, from_blocks(lows, shape, block), from_blocks(highs, shape, block)
    )
    if qparams.degenerate:
        notes.append(f"{qparams.degenerate} of {qparams.scale.numel()} block(s) hold only zeros")
    if shape[1] % block[1]:
        notes.append(f"last group of each row holds {shape[1] % block[1]} of {block[1]} values")
    if shape[0] % block[0]:
        notes.append(f"last row of blocks holds {shape[0] % block[0]} of {block[0]} rows")
    return qparams, _broadcast(spec, qparams, matrix), notes


def _calibrated(fmt: Format) -> bool:
    return fmt.scaled and fmt.block is None


def _by_group(
    correction: Gptq | AdaRound, target: Tensor, qparams: QParams, moments: Moments
) -> tuple[Tensor, Tensor]:
    """A rounding applied to each group's rows with the group's own inputs."""
    scale = qparams.scale.expand(target.shape)
    zero_point = qparams.zero_point.expand(target.shape)
    rows = len(target) // len(moments.gram)
    parts = []
    for group, gram in enumerate(moments.gram):
        at = slice(group * rows, (group + 1) * rows)
        own = QParams(qparams.format, scale[at], zero_point[at])
        parts.append(correction.round(target[at], own, gram))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _output_errors(
    matrix: Tensor,
    spec: Spec,
    nearest: Tensor,
    rounded: Tensor,
    scaling: Tensor | None,
    moments: Moments,
) -> tuple[float, float]:
    """Before and after correction, over the outputs' own mean square; moments as they stand after
    scaling."""
    target = matrix if scaling is None else matrix * scaling
    plain = nearest
    if scaling is not None:
        plain = fake_quantize(matrix, _chosen(matrix, spec)[1]) * scaling
    signal = float(moments.output_error(target).sum()) or 1.0
    before = float(moments.output_error(plain - target).sum()) / signal
    return before, float(moments.output_error(rounded - target).sum()) / signal


def _block_size(spec: Spec, shape: tuple[int, int]) -> tuple[int, int]:
    assert isinstance(spec.granularity, PerTensor | PerAxis | PerGroup | PerBlock)
    return spec.granularity.block_size(shape)


def _broadcast(spec: Spec, qparams: QParams, matrix: Tensor) -> QParams:
    shape = (matrix.shape[0], matrix.shape[1])
    block = _block_size(spec, shape)
    return QParams(
        qparams.format,
        expand(qparams.scale, shape, block),
        expand(qparams.zero_point, shape, block),
        qparams.degenerate,
    )
