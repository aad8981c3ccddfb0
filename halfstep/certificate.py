"""Certificates: the measured proof, element by element, that a site's error obeys its bound."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from halfstep.qparams import QParams

FLOAT32_SLACK = 2.0**-22
"""Relative to the value itself: the two float32 multiplications around the rounding, and the
rounding of the reciprocal, move a value by at most three times 2**-24 of it."""


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
    exact = x.double()
    scale = qparams.scale.double() if fmt.scaled else torch.ones(1, dtype=torch.float64)
    lower, upper = (end.double() for end in fmt.limits(qparams.zero_point))
    u = exact / scale
    error = (approximation.double() - exact).abs()
    beyond = torch.maximum(lower - u, u - upper).clamp(min=0.0)
    half_gap = fmt.gap(torch.maximum(torch.minimum(u, upper), lower)).double() / 2
    bound = 2 * gaps * half_gap * scale + FLOAT32_SLACK * exact.abs()
    in_range = beyond <= half_gap
    ratio = torch.where(in_range, error / bound, 0.0)
    noise = float(error.square().sum())
    signal = float(exact.square().sum())
    certificate = Certificate(
        site=site,
        target=target,
        of=of or target,
        format=fmt.name,
        elements=x.numel(),
        error_over_bound=float(ratio.max()),
        max_error=float(error.max()),
        max_in_range_error=float(torch.where(in_range, error, 0.0).max()),
        step=float(scale.max()),
        clipped=int((~in_range).sum()),
        clip_excess=float(torch.where(in_range, 0.0, beyond * scale).max()),
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
