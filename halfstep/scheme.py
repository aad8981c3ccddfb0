"""Schemes: what is done to every site. A scheme is one cell of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from halfstep.corrections import Correction
from halfstep.formats import Format
from halfstep.granularity import Granularity, PerBlock, PerPosition
from halfstep.operators import SUM
from halfstep.sites import ActivationSite, Sites, WeightSite, matches

DYNAMIC = "dynamic"
"""Stands where a calibrator's name would: the range is taken from each token as it passes."""
NOT_CALIBRATED = "cast"
"""Stands where a calibrator's name would for formats that are only cast."""
OWN_RULE = "block"
"""Stands where a calibrator's name would: the format has a rule for each block's scale."""
KEEP: Literal["keep"] = "keep"
"""In an override: this side stays as the cell has it."""
POSITIONS = ("first", "last")
SIMULATED = "simulated"
"""The backend that is halfstep's own arithmetic."""


@dataclass(frozen=True)
class Spec:
    """How one kind of tensor is quantized."""

    format: Format
    granularity: Granularity
    calibrator: str

    def __post_init__(self) -> None:
        """One scheme, one spelling: what could not matter is not part of it."""
        if not self.format.scaled:
            object.__setattr__(self, "calibrator", NOT_CALIBRATED)
        elif self.format.block is not None:
            object.__setattr__(self, "granularity", PerBlock(1, self.format.block))
            object.__setattr__(self, "calibrator", OWN_RULE)
        elif self.granularity.dynamic:
            object.__setattr__(self, "calibrator", DYNAMIC)
        elif isinstance(self.granularity, PerPosition):
            object.__setattr__(self, "calibrator", "minmax")
        elif self.calibrator == "sqnr":
            # The signal does not depend on the range, so the least error has the highest SQNR.
            object.__setattr__(self, "calibrator", "mse")

    def __str__(self) -> str:
        if not self.format.scaled or self.format.block is not None:
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

    @property
    def needs_sketch(self) -> bool:
        """For an activation: true where calibration fixes its range, or a part of its scale."""
        if self.format.block is not None:
            return self.format.tensor_scaled
        return self.format.scaled and not self.granularity.dynamic


Side = Spec | None | Literal["keep"]


@dataclass(frozen=True)
class Override:
    """Another treatment for some sites. It changes a side only where the cell quantizes that side;
    of several overrides that name a site the last one counts."""

    names: tuple[str, ...] = ()
    """Patterns, shell style."""
    kinds: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    """``first`` and ``last``: of the operations that multiply by a weight, as they run."""
    weights: Side = KEEP
    activations: Side = KEEP

    def names_site(self, site: WeightSite | ActivationSite, sites: Sites) -> bool:
        if site.kind in self.kinds or any(matches(site.name, p) for p in self.names):
            return True
        ends = dict(zip(POSITIONS, sites.ends, strict=True))
        chosen = {ends[p] for p in self.positions}
        return any(
            site.name in (o.weight, *o.activations) for o in sites.operations if o.name in chosen
        )

    def __str__(self) -> str:
        where = [*self.positions, *(f"kind {k}" for k in self.kinds), *self.names]
        what = [
            f"{side} {value or 'fp32'}"
            for side, value in (("W", self.weights), ("A", self.activations))
            if value != KEEP
        ]
        return f"{', '.join(where)}: {' · '.join(what)}"

    def to_json(self) -> dict[str, object]:
        sides = {"weights": self.weights, "activations": self.activations}
        return {
            "names": list(self.names),
            "kinds": list(self.kinds),
            "positions": list(self.positions),
            **{
                side: value.to_json() if isinstance(value, Spec) else {"format": "none"}
                for side, value in sides.items()
                if value != KEEP
            },
        }


@dataclass(frozen=True)
class Scheme:
    """Weights and activations, each quantized as its spec says or left at full precision."""

    weights: Spec | None
    activations: Spec | None
    corrections: tuple[Correction, ...] = ()
    """In the order in which they are applied."""
    overrides: tuple[Override, ...] = ()
    label: str = ""
    """What a scheme is called whose overrides make it what it is, instead of after its specs."""
    backend: str = SIMULATED
    """What runs it."""
    sums: Spec | None = None
    """Of the terms of sums of two activations, as kernels want them that add codes up."""

    @property
    def name(self) -> str:
        if self.deployed:
            return f"{self.simulation.name} · {self.backend}"
        if self.label:
            return self.label
        plain = f"W {self.weights or 'fp32'} · A {self.activations or 'fp32'}"
        sums = f"sums {self.sums}" if self.sums else ""
        corrections = " + ".join(map(str, self.corrections))
        return " · ".join(filter(None, [plain, sums, corrections]))

    @property
    def deployed(self) -> bool:
        """True where a backend's own kernels run it."""
        return self.backend != SIMULATED

    @property
    def simulation(self) -> Scheme:
        """The same, simulated."""
        return replace(self, backend=SIMULATED)

    @property
    def needs_sketches(self) -> bool:
        """True where an activation range is fixed by calibration."""
        return any(spec.needs_sketch for spec in self.activation_specs)

    @property
    def activation_specs(self) -> list[Spec]:
        """Every spec that some activation may meet."""
        if self.activations is None:
            return []
        others = [o.activations for o in self.overrides if isinstance(o.activations, Spec)]
        return [self.activations, *filter(None, [self.sums]), *others]

    def weight_spec(self, site: WeightSite, sites: Sites) -> Spec | None:
        """The spec of one weight."""
        return self._resolved(self.weights, "weights", site, sites)

    def activation_spec(self, site: ActivationSite, sites: Sites) -> Spec | None:
        """The spec of one activation."""
        spec = self.sums if site.kind == SUM else self.activations
        return self._resolved(spec, "activations", site, sites)

    def _resolved(
        self, spec: Spec | None, side: str, site: WeightSite | ActivationSite, sites: Sites
    ) -> Spec | None:
        if spec is None:
            return None
        found: Side = spec
        for override in self.overrides:
            value: Side = getattr(override, side)
            if value != KEEP and override.names_site(site, sites):
                found = value
        return found  # type: ignore[return-value]

    def to_json(self) -> dict[str, object]:
        return {
            "weights": self.weights.to_json() if self.weights else None,
            "activations": self.activations.to_json() if self.activations else None,
            "corrections": [correction.to_json() for correction in self.corrections],
            "overrides": [override.to_json() for override in self.overrides],
            **({"sums": self.sums.to_json()} if self.sums else {}),
            **({"label": self.label} if self.label else {}),
            **({"backend": self.backend} if self.deployed else {}),
        }


def skipping(patterns: tuple[str, ...]) -> tuple[Override, ...]:
    """The override that leaves the sites of some patterns at full precision."""
    return (Override(names=patterns, weights=None, activations=None),) if patterns else ()


Specs = Mapping[str, Spec | None]
