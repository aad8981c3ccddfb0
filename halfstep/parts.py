"""The parts of a scheme: what it does to each site, by itself and left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from halfstep.apply import Treatment
from halfstep.scheme import Scheme, Spec
from halfstep.sites import ActivationSite, Sites, WeightSite
from halfstep.treatments import Treatments

WEIGHT, ACTIVATION = "weight", "activation"
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Part:
    """One site under one scheme."""

    site: str
    side: str
    """`WEIGHT` or `ACTIVATION`."""
    kind: str
    end: str
    """``first`` or ``last`` where its operation is that of the model; else empty."""
    spec: Spec
    alone: Treatment
    """Only this site is quantized."""
    restored: Treatment
    """Every site of the scheme but this one."""


def parts(treatments: Treatments, sites: Sites, scheme: Scheme) -> list[Part]:
    """Every site that the scheme quantizes, weights first, in order of the model."""
    full, plain = treatments.for_scheme(scheme), treatments.unquantized(scheme)
    ends = dict(zip(sites.ends, ("first", "last"), strict=True))
    marks = {
        name: ends[operation.name]
        for operation in sites.operations
        if operation.name in ends
        for name in (operation.weight, *operation.activations)
    }

    def part(site: WeightSite | ActivationSite, side: str, spec: Spec, own: Treatment) -> Part:
        """``own``: the parameters and activations that belong to the site."""
        alone = replace(
            plain,
            parameters={**plain.parameters, **own.parameters},
            activations={**plain.activations, **own.activations},
        )
        restored = replace(
            full,
            parameters=_without(full.parameters, own.parameters, plain.parameters),
            activations=_without(full.activations, own.activations, plain.activations),
        )
        return Part(site.name, side, site.kind, marks.get(site.name, ""), spec, alone, restored)

    found = []
    for weight in sites.weights:
        spec = scheme.weight_spec(weight, sites)
        if spec is not None:
            names = [*weight.parameters, *treatments.corrected_bias(scheme, weight)]
            own = Treatment({n: full.parameters[n] for n in names})
            found.append(part(weight, WEIGHT, spec, own))
    for active in sites.activations:
        spec = scheme.activation_spec(active, sites)
        if spec is not None:
            own = Treatment(activations={active.name: full.activations[active.name]})
            found.append(part(active, ACTIVATION, spec, own))
    return found


def _without(full: Mapping[str, T], own: Mapping[str, T], plain: Mapping[str, T]) -> dict[str, T]:
    """``full``, with what is ``own`` as it is in ``plain``."""
    kept = {name: value for name, value in full.items() if name not in own}
    return kept | {name: plain[name] for name in own if name in plain}
