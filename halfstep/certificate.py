"""Certificates: the measured proof, element by element, that a site's error obeys its bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from halfstep.qparams import QParams

FLOAT32_SLACK = 2.0**-22
"""Relative to the value itself: the two float32 multiplications around the rounding, and the
rounding of the reciprocal, move a value by at most three times 2**-24 of it."""

PART = 2**15
"""Elements that are checked at a time."""


class BoundViolated(Exception):
    """An in-range value moved by more than its format's bound: a defect of halfstep."""


@dataclass(frozen=True)
class Certificate:
    """What was measured over the elements of one weight or activation."""

    site: str
    target: str
    """``weight`` or ``activation``."""
    of: str
    """What was rounded: ``weight``, or the ``scaled`` or ``compensated`` weight that a correction
    made of it; ``activation``, or the ``scaled activation``."""
    format: str
    elements: int
    error_over_bound: float
    """Largest in-range error over its bound; at most 1 where the bound holds."""
    max_error: float
    """Largest absolute error, clipped values included."""
    max_in_range_error: float
    step: float
    """Largest scale (uniform formats: the step) of the site."""
    clipped: int
    clip_excess: float
    """Largest distance of a clipped value from the end of the range."""
    bound_in_gaps: float
    """Half a gap; one where the rounding was learned."""
    clips_by_design: bool
    """True where the format's scale rule may leave large values out of range."""
    sqnr_db: float | None
    """Signal over quantization noise; None where the noise is zero."""
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return self.error_over_bound <= 1.0

    @property
    def clipped_share(self) -> float:
        return self.clipped / self.elements if self.elements else 0.0

    def to_json(self) -> dict[str, object]:
        record = asdict(self)
        record["notes"] = list(self.notes)
        return {**record, "clipped_share": self.clipped_share, "holds": self.holds}


def certify(
    site: str,
    target: str,
    x: Tensor,
    approximation: Tensor,
    qparams: QParams,
    notes: tuple[str, ...] = (),
    *,
    gaps: float = 0.5,
    of: str = "",
) -> Certificate:
    """Checks every element against its bound, in float64.

    The bound of an element is half the gap of the grid at that element (uniform formats: half a
    step), times the scale, plus `FLOAT32_SLACK` of the element. A value is in range up to half a
    gap beyond the end of the grid; past that it counts as clipped.

    Args:
        x: what was rounded, float32.
        gaps: the bound in gaps of the grid; 1 where the rounding was learned, and a value may go
            to either neighbour.
        of: what ``x`` is, where it is not the plain target.

    Raises:
        BoundViolated: an in-range element moved further than its bound.
    """
    fmt = qparams.format
    found = [
        _measured(part, approximations, own, gaps)
        for part, approximations, own in _in_parts(x, approximation, qparams)
    ]
    noise, signal = (math.fsum(column) for column in zip(*[m.powers for m in found], strict=True))
    certificate = Certificate(
        site=site,
        target=target,
        of=of or target,
        format=fmt.name,
        elements=x.numel(),
        error_over_bound=_largest(m.error_over_bound for m in found),
        max_error=_largest(m.error for m in found),
        max_in_range_error=_largest(m.in_range_error for m in found),
        step=float(qparams.scale.double().max()) if fmt.scaled else 1.0,
        clipped=sum(m.clipped for m in found),
        clip_excess=_largest(m.clip_excess for m in found),
        bound_in_gaps=gaps,
        clips_by_design=fmt.clips,
        sqnr_db=10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None,
        notes=notes,
    )
    if not certificate.holds:
        raise BoundViolated(
            f"{target} of {site}: an in-range value moved by {certificate.error_over_bound:.6f} "
            f"of its bound under {fmt.name}"
        )
    return certificate


@dataclass(frozen=True)
class _Measured:
    """Of some of the elements."""

    error_over_bound: float
    error: float
    in_range_error: float
    clipped: int
    clip_excess: float
    powers: tuple[float, float]
    """Sums of squares of the errors, and of the values."""


def _measured(x: Tensor, approximation: Tensor, qparams: QParams, gaps: float) -> _Measured:
    fmt = qparams.format
    exact = x.double()
    scale = qparams.scale.double() if fmt.scaled else torch.ones((), dtype=torch.float64)
    lower, upper = (end.double() for end in fmt.limits(qparams.zero_point))
    u = exact / scale
    error = approximation.double().sub_(exact).abs_()
    half_gap = fmt.gap(u.clamp(lower, upper)).double() / 2
    bound = (exact.abs() * FLOAT32_SLACK).add_(2 * gaps * half_gap * scale)
    largest = float(error.max())
    beyond = torch.maximum(lower - u, u - upper).clamp_(min=0.0)
    out = ~(beyond <= half_gap)  # NaN is out of every range
    clipped, excess, in_range = int(out.sum()), 0.0, largest
    ratio = error / bound
    if clipped:
        excess = float(torch.where(out, beyond * scale, 0.0).max())
        in_range = float(error.masked_fill(out, 0.0).max())
        ratio.masked_fill_(out, 0.0)
    powers = float(error.square_().sum()), float(exact.square_().sum())
    return _Measured(float(ratio.max()), largest, in_range, clipped, excess, powers)


def _largest(values: Iterable[float]) -> float:
    """NaN where any is, unlike Python's ``max``."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _in_parts(
    x: Tensor, approximation: Tensor, qparams: QParams
) -> Iterator[tuple[Tensor, Tensor, QParams]]:
    """Some rows at a time, so that what is made on the way stays in the processor's cache."""
    rows = max(1, PART * len(x) // max(x.numel(), 1)) if x.dim() else 0
    if not 0 < rows < len(x):
        yield x, approximation, qparams
        return
    by_row = qparams.scale.dim() == x.dim() and len(qparams.scale) == len(x)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        own = qparams
        if by_row:
            own = replace(qparams, scale=qparams.scale[part], zero_point=qparams.zero_point[part])
        yield x[part], approximation[part], own
