"""Weight quantization: from a site's exact weight and a spec to codes, qparams and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from halfstep.calibrators import parse_calibrator
from halfstep.granularity import PerToken, expand, from_blocks, grid_shape, to_blocks
from halfstep.observed import Exact
from halfstep.qparams import QParams, choose_qparams
from halfstep.quantize import fake_quantize, quantize
from halfstep.scheme import Spec
from halfstep.sites import as_matrix

SCALE_BYTES = 4
ZERO_POINT_BYTES = 1


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight under one spec."""

    spec: Spec
    qparams: QParams
    """On the granularity's grid over the ``[out, reduction]`` matrix."""
    values: Tensor
    """The dequantized weight, float32, in the weight's own shape."""
    notes: tuple[str, ...]

    def broadcast(self) -> QParams:
        """The qparams made broadcastable against the ``[out, reduction]`` matrix."""
        return _broadcast(self.spec, self.qparams, as_matrix(self.values))

    def codes(self, weight: Tensor) -> Tensor:
        """The integer (or small float) codes of the weight these qparams were chosen for."""
        matrix = as_matrix(weight)
        return quantize(matrix, _broadcast(self.spec, self.qparams, matrix)).reshape(weight.shape)

    @property
    def bytes(self) -> int:
        """Size at rest, see `packed_bytes`."""
        return packed_bytes(self.values.shape, self.spec)


def packed_bytes(shape: Sequence[int], spec: Spec) -> int:
    """Size at rest of a weight of some shape under a spec.

    Codes packed without gaps, and for each block one float32 scale and, where the format is
    asymmetric, one zero point of a byte. Formats that are only cast have no scale.
    """
    code_bytes = math.ceil(math.prod(shape) * spec.format.bits / 8)
    if not spec.format.scaled:
        return code_bytes
    matrix = (shape[0], math.prod(shape[1:]))
    assert not isinstance(spec.granularity, PerToken)
    blocks = math.prod(grid_shape(matrix, spec.granularity.block_size(matrix)))
    return code_bytes + blocks * (SCALE_BYTES + (0 if spec.format.symmetric else ZERO_POINT_BYTES))


def quantize_weight(weight: Tensor, spec: Spec) -> QuantizedWeight:
    """Calibrates and quantizes one weight (float32, finite)."""
    if isinstance(spec.granularity, PerToken):
        raise ValueError("weights have no tokens")
    matrix = as_matrix(weight).contiguous()
    shape = (matrix.shape[0], matrix.shape[1])
    block = spec.granularity.block_size(shape)
    notes: list[str] = []
    lows, highs = [], []
    calibrator = parse_calibrator(spec.calibrator if spec.format.scaled else "minmax")
    for blocks in to_blocks(matrix, block):
        chosen = calibrator(Exact(blocks), spec.format)
        lows.append(chosen.lo)
        highs.append(chosen.hi)
        notes += chosen.notes
    grid = grid_shape(shape, block)
    qparams = choose_qparams(spec.format, from_blocks(lows, grid), from_blocks(highs, grid))
    if qparams.degenerate:
        notes.append(f"{qparams.degenerate} of {qparams.scale.numel()} block(s) hold only zeros")
    if shape[1] % block[1]:
        notes.append(f"last group of each row holds {shape[1] % block[1]} of {block[1]} values")
    values = fake_quantize(matrix, _broadcast(spec, qparams, matrix))
    return QuantizedWeight(spec, qparams, values.reshape(weight.shape), tuple(notes))


def _broadcast(spec: Spec, qparams: QParams, matrix: Tensor) -> QParams:
    assert not isinstance(spec.granularity, PerToken)
    shape = (matrix.shape[0], matrix.shape[1])
    block = spec.granularity.block_size(shape)
    return QParams(
        qparams.format,
        expand(qparams.scale, shape, block),
        expand(qparams.zero_point, shape, block),
        qparams.degenerate,
    )
