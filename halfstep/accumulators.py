"""Accumulators: could the int32 sum of an integer product overflow? Answered from codes and shapes.

An integer kernel adds up ``(a - zero_point) * w`` in 32 bits and puts the bias, as an integer of
scale ``s_a * s_w``, in front (Jacob et al. 2018, section 2.4). Simulated arithmetic would not show
an overflow, so it is bounded here: per output by the sum of the codes' magnitudes, times the
largest code an activation can have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from halfstep.activations import StaticQuantizer, TreatedActivation
from halfstep.apply import Treatment
from halfstep.formats import Uniform
from halfstep.operators import SUM
from halfstep.sites import Sites
from halfstep.weights import QuantizedWeight

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Accumulator:
    """The largest sum that one operation could come to."""

    operation: str
    largest: int
    """Bound on ``|sum of products| + |integer bias|``."""
    bias: int | None
    """Largest integer bias; None where there is none, or its scale depends on the input."""

    @property
    def bits(self) -> int:
        """Bits of a signed accumulator that always holds it."""
        return self.largest.bit_length() + 1

    @property
    def overflows(self) -> bool:
        return self.largest > INT32_MAX

    @property
    def note(self) -> str:
        return (
            f"{self.operation}: an int32 accumulator could overflow: the sum can reach "
            f"{self.largest:,}, which takes {self.bits} bits"
        )

    def to_json(self) -> dict[str, object]:
        return {
            "operation": self.operation,
            "largest": self.largest,
            "bits": self.bits,
            "bias": self.bias,
            "overflows": self.overflows,
        }


def accumulators(
    treatment: Treatment, sites: Sites, biases: Mapping[str, Tensor]
) -> tuple[Accumulator, ...]:
    """One row for every operation whose factors are both integers. ``biases`` by operation."""
    found = []
    for operation in sites.operations:
        inputs = [treatment.activations.get(name) for name in operation.activations]
        codes = [_largest_code(treated) for treated in inputs]
        if not inputs or None in codes or operation.kind == SUM:
            continue
        if operation.weight is None:
            # Attention holds two products: query by key, and probabilities by value.
            pairs = [codes[i : i + 2] for i in range(0, len(codes), 2)]
            worst = max(math.prod(c for c in pair if c is not None) for pair in pairs)
            found.append(Accumulator(operation.name, operation.reduction * worst, None))
            continue
        weight = treatment.weights.get(operation.weight)
        if weight is None or not isinstance(weight.spec.format, Uniform):
            continue
        assert codes[0] is not None
        found.append(_of_weight(operation.name, weight, inputs[0], codes[0], biases))
    return tuple(found)


def _largest_code(treated: TreatedActivation | None) -> int | None:
    """Largest ``|code - zero_point|``; None where the activation is not an integer."""
    if treated is None or treated.quantizer is None:
        return None
    quantizer = treated.quantizer
    if isinstance(quantizer, StaticQuantizer):
        fmt = quantizer.qparams.format
        if not isinstance(fmt, Uniform):
            return None
        lower, upper = fmt.limits(quantizer.qparams.zero_point)
        return int(max(float(lower.abs().max()), float(upper.abs().max())))
    fmt = quantizer.qparams.format if hasattr(quantizer, "qparams") else quantizer.format
    if not isinstance(fmt, Uniform):
        return None
    # The zero point is chosen as the input passes: any of its codes.
    return (
        fmt.quant_max - fmt.quant_min if not fmt.symmetric else max(-fmt.quant_min, fmt.quant_max)
    )


def _of_weight(
    name: str,
    weight: QuantizedWeight,
    treated: TreatedActivation | None,
    code: int,
    biases: Mapping[str, Tensor],
) -> Accumulator:
    q = weight.broadcast()
    steps = (weight.rounded.double() / q.scale.double()).round().abs()
    largest = int(_by_accumulator(steps, weight).max()) * code
    quantizer = treated.quantizer if treated is not None else None
    bias = biases.get(name)
    integer_bias = None
    one_scale_a_row = weight.qparams.scale.shape[1] == 1
    if bias is not None and isinstance(quantizer, StaticQuantizer) and one_scale_a_row:
        scale = q.scale.double().expand(len(weight.rounded), -1)[:, 0]
        scale = scale * float(quantizer.qparams.scale)
        if len(bias) == len(scale):
            integer_bias = int((bias.double() / scale).abs().max().round().clamp(max=2.0**62))
            largest += integer_bias
    return Accumulator(name, largest, integer_bias)


def _by_accumulator(steps: Tensor, weight: QuantizedWeight) -> Tensor:
    """Sums of code magnitudes: of a row, or of each group where groups have scales of their own,
    since a kernel adds those up apart."""
    columns = weight.qparams.scale.shape[1]
    if columns == 1:
        return steps.sum(1)
    size = -(-steps.shape[1] // columns)
    padded = F.pad(steps, (0, columns * size - steps.shape[1]))
    return padded.reshape(len(steps), columns, size).sum(-1)


def overflowing(found: Sequence[Accumulator]) -> tuple[str, ...]:
    """Notes on those that could overflow."""
    return tuple(one.note for one in found if one.overflows)
