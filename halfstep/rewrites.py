"""Rewrites: corrections that exchange the model for another one with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from halfstep.corrections import CrossLayerEqualization, SmoothQuant
from halfstep.corrections.cle import find_pairs
from halfstep.moments import Moments
from halfstep.sites import Sites, WeightSite


@dataclass(frozen=True, eq=False)
class Rewrite:
    """Parameters in place of the model's, and factors that inputs are divided by on the way."""

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """By first name, float32."""
    divisors: Mapping[str, Tensor] = field(default_factory=dict)
    """By activation site, float32, one a channel: divided by at run time."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """By weight site: what the channels of its input are divided by altogether, float64."""
    notes: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        return not self.parameters and not self.divisors

    def weight(self, site: WeightSite, model: nn.Module) -> Tensor:
        """The site's weight under the rewrite."""
        return self.parameters.get(site.parameters[0], site.read(model))

    def moments(self, site: WeightSite, original: Moments) -> Moments:
        """Moments of the site's input under the rewrite."""
        factor = self.inputs.get(site.name)
        return original if factor is None else original.divided(original.by_column(factor))


def rewritten(
    rewrite: Rewrite,
    correction: CrossLayerEqualization | SmoothQuant,
    model: nn.Module,
    sites: Sites,
    moments: Callable[[], Mapping[str, Moments]],
) -> Rewrite:
    """One more rewriting correction, on top of those before it."""
    if isinstance(correction, SmoothQuant):
        return _smoothed(rewrite, correction, model, sites, moments())
    return _equalized(rewrite, correction, model, sites)


def _equalized(
    rewrite: Rewrite, correction: CrossLayerEqualization, model: nn.Module, sites: Sites
) -> Rewrite:
    pairs, why_none = find_pairs(model)
    if not pairs:
        return replace(rewrite, notes=(*rewrite.notes, why_none))
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    layers = {name: copy.deepcopy(model.get_submodule(name)) for name in names}
    for name, layer in layers.items():
        for own in ("weight", "bias"):
            changed = rewrite.parameters.get(f"{name}.{own}")
            if changed is not None:
                setattr(layer, own, nn.Parameter(changed, requires_grad=False))
    factors = correction.equalize(layers, pairs)
    parameters = dict(rewrite.parameters)
    for name, layer in layers.items():
        parameters |= {f"{name}.{n}": p.detach() for n, p in layer.named_parameters()}
    inputs = dict(rewrite.inputs)
    for site in sites.weights:
        if site.name in factors:
            inputs[site.name] = inputs.get(site.name, torch.ones(())) * factors[site.name]
    note = "cle equalized " + ", ".join(f"{a} with {b}" for a, b in pairs)
    return Rewrite(parameters, rewrite.divisors, inputs, (*rewrite.notes, note))


def _smoothed(
    rewrite: Rewrite,
    correction: SmoothQuant,
    model: nn.Module,
    sites: Sites,
    moments: Mapping[str, Moments],
) -> Rewrite:
    parameters, divisors = dict(rewrite.parameters), dict(rewrite.divisors)
    inputs, notes = dict(rewrite.inputs), list(rewrite.notes)
    by_name = {site.name: site for site in sites.weights}
    for readers in _sharing(sites):
        members = [by_name[name] for name in readers]
        usable = [site for site in members if site.name in moments and _one_use(site, sites)]
        if len(usable) < len(members):
            named = ", ".join(sorted({s.name for s in members} - {s.name for s in usable}))
            notes.append(f"smoothquant does not apply to {named}: it is used in other ways too")
            continue
        found = [rewrite.moments(site, moments[site.name]) for site in usable]
        x_max = found[0].by_channel(found[0].amax, "amax")
        w_max = torch.stack(
            [
                m.by_channel(_column_maxima(site, rewrite.weight(site, model), m), "amax")
                for site, m in zip(usable, found, strict=True)
            ]
        ).amax(0)
        factors = correction.factors(x_max, w_max)
        for site, m in zip(usable, found, strict=True):
            weight = rewrite.weight(site, model)
            matrix = site.layout.matrix(weight)
            columns = m.by_column(factors).repeat_interleave(len(matrix) // len(m.mean), dim=0)
            scaled = (matrix.double() * columns).float()
            parameters[site.parameters[0]] = site.layout.weight(scaled, weight.shape).contiguous()
            inputs[site.name] = inputs.get(site.name, torch.ones(())) * factors
        divisors |= {
            a.name: divisors.get(a.name, torch.ones(())) * factors.float()
            for a in sites.activations
            if a.weight in readers
        }
    return Rewrite(parameters, divisors, inputs, tuple(notes))


def _sharing(sites: Sites) -> list[list[str]]:
    """Weight sites, grouped by the activation that they read."""
    groups: dict[str, list[str]] = {}
    for site in sites.activations:
        if site.weight is not None:
            group = groups.setdefault(site.same_as, [])
            if site.weight not in group:
                group.append(site.weight)
    return list(groups.values())


def _one_use(site: WeightSite, sites: Sites) -> bool:
    """True where exactly one product reads the weight, and no table look-up does."""
    return sum(o.weight == site.name for o in sites.operations) == 1


def _column_maxima(site: WeightSite, weight: Tensor, moments: Moments) -> Tensor:
    """Largest ``|w|`` of each column, ``[groups, reduction]``."""
    matrix = site.layout.matrix(weight).abs().double()
    return matrix.reshape(len(moments.mean), -1, matrix.shape[1]).amax(1)
