"""Schemes: what is done to every site. A scheme is one cell of the matrix."""

from __future__ import annotations

from dataclasses import dataclass

from halfstep.formats import Format
from halfstep.granularity import Granularity

DYNAMIC = "dynamic"
"""Stands where a calibrator's name would: the range is taken from each token as it passes."""
NOT_CALIBRATED = "cast"
"""Stands where a calibrator's name would for formats that are only cast."""


@dataclass(frozen=True)
class Spec:
    """How one kind of tensor is quantized."""

    format: Format
    granularity: Granularity
    calibrator: str

    def __post_init__(self) -> None:
        """One scheme, one spelling: a calibrator that could not matter is not part of it."""
        if not self.format.scaled:
            object.__setattr__(self, "calibrator", NOT_CALIBRATED)
        elif self.granularity.dynamic:
            object.__setattr__(self, "calibrator", DYNAMIC)

    def __str__(self) -> str:
        if not self.format.scaled:
            return self.format.name
        if self.granularity.dynamic:
            return f"{self.format.name} {self.granularity}"
        return f"{self.format.name} {self.granularity} {self.calibrator}"

    def to_json(self) -> dict[str, str]:
        return {
            "format": self.format.name,
            "granularity": str(self.granularity) if self.format.scaled else "none",
            "calibrator": self.calibrator,
        }


@dataclass(frozen=True)
class Scheme:
    """Weights and activations, each quantized as its spec says or left at full precision."""

    weights: Spec | None
    activations: Spec | None

    @property
    def name(self) -> str:
        return f"W {self.weights or 'fp32'} · A {self.activations or 'fp32'}"

    @property
    def needs_sketches(self) -> bool:
        """True where an activation range is fixed by calibration."""
        spec = self.activations
        return spec is not None and spec.format.scaled and not spec.granularity.dynamic

    def to_json(self) -> dict[str, dict[str, str] | None]:
        return {
            "weights": self.weights.to_json() if self.weights else None,
            "activations": self.activations.to_json() if self.activations else None,
        }
