"""Coverage: the ledger of every place that computes or holds parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from halfstep.operators import SUM
from halfstep.scheme import Scheme
from halfstep.sites import Sites, matches

PRODUCTS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
    nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag, nn.RNNBase,
    nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip
NO_PRODUCTS = "no multiply-accumulates: stays at full precision"


@dataclass(frozen=True)
class Place:
    """One row of the ledger: a product, a module, or parameters that enter no product."""

    name: str
    kind: str
    parameters: int
    macs: int
    """Multiply-accumulates for one example."""
    weight: str | None
    """The weight site that is used here; its parameters count at its first use."""
    activations: tuple[str, ...]
    reason: str
    """Why it cannot be quantized; empty for places that can."""


@dataclass(frozen=True)
class Covered:
    """A place under one scheme."""

    place: Place
    weights: str
    """The weight's spec, ``fp32``, or empty where there is no weight."""
    activations: str
    reason: str
    """Why nothing of it is quantized; empty where something is."""

    @property
    def quantized(self) -> bool:
        return not self.reason


def places(model: nn.Module, sites: Sites, folded: Sequence[str] = ()) -> tuple[Place, ...]:
    """Every place of a model: products in the order of the forward pass, then what is no product.

    Args:
        folded: names of batch norms that were folded into the layer before them.
    """
    unique = dict(model.named_parameters())
    counted: set[str] = set()
    found: list[Place] = []
    holds = {site.name: site.parameters[0] for site in sites.weights}
    for operation in sites.operations:
        own = 0
        if operation.weight is not None and holds[operation.weight] not in counted:
            counted.add(holds[operation.weight])
            own = unique[holds[operation.weight]].numel()
        found.append(
            Place(operation.name, operation.kind, own, operation.macs, operation.weight,
                  operation.activations, "")
        )  # fmt: skip
    biases = 0
    owners = {name.rpartition(".")[0] for name in counted}
    for name, module in model.named_modules():
        own_names = {
            f"{name}.{p}".lstrip("."): p for p, _ in module.named_parameters(recurse=False)
        }
        left = [n for n in own_names if n in unique and n not in counted]
        if name in owners:
            biases += sum(unique[n].numel() for n in left if "bias" in own_names[n])
            left = [n for n in left if "bias" not in own_names[n]]
        own = sum(unique[n].numel() for n in left)
        kind = type(module).__name__
        if name in folded:
            found.append(_fixed(name, "batch norm", own, "folded into the layer before it"))
        elif isinstance(module, PRODUCTS) and own:
            found.append(_fixed(name, kind, own, "no forward pass reached it"))
        elif own:
            leaf = next(module.children(), None) is None
            reason = (
                f"modules of type {kind} are not quantized"
                if leaf
                else "parameters that enter no product"
            )
            for_name = name if leaf else ", ".join(left)
            found.append(_fixed(for_name, kind if leaf else "parameter", own, reason))
        elif next(module.children(), None) is None and not isinstance(module, PRODUCTS):
            found.append(_fixed(name or "(model)", kind, 0, NO_PRODUCTS))
    if biases:
        found.append(_fixed("(biases)", "bias", biases, "added to accumulators at full precision"))
    for other in sites.elsewhere:
        times = f" ×{other.calls}" if other.calls > 1 else ""
        name = f"{other.scope}.{other.function}{times}".lstrip(".")
        found.append(Place(name, "functional", 0, other.macs, None, (), other.reason))
    return tuple(found)


def _fixed(name: str, kind: str, parameters: int, reason: str) -> Place:
    return Place(name, kind, parameters, 0, None, (), reason)


def covered(
    places: Sequence[Place], scheme: Scheme, sites: Sites, skip: Sequence[str]
) -> tuple[Covered, ...]:
    """The ledger under one scheme. ``skip`` are the patterns of sites left at full precision."""
    weights = {s.name: scheme.weight_spec(s, sites) for s in sites.weights}
    activations = {s.name: scheme.activation_spec(s, sites) for s in sites.activations}
    rows = []
    for place in places:
        if place.reason:
            rows.append(Covered(place, "", "", place.reason))
            continue
        weight = weights[place.weight] if place.weight else None
        inputs = [activations[name] for name in place.activations]
        told = list(dict.fromkeys(str(spec or "fp32") for spec in inputs))
        reason = ""
        if weight is None and not any(inputs):
            pattern = next((p for p in skip if _named(place, p)), None)
            reason = f"skipped by pattern {pattern!r}" if pattern else _why_not(place, scheme)
        rows.append(
            Covered(place, str(weight or "fp32") if place.weight else "", ", ".join(told), reason)
        )
    return tuple(rows)


def _named(place: Place, pattern: str) -> bool:
    names = [n for n in (place.weight, place.name, *place.activations) if n]
    return any(matches(name, pattern) for name in names)


def _why_not(place: Place, scheme: Scheme) -> str:
    if place.kind == SUM:
        return "a sum, and the scheme leaves its terms at full precision"
    if scheme.activations is None and place.weight is None:
        return "a product of activations, and the scheme leaves those at full precision"
    if scheme.weights is None and not place.activations:
        return "a table of weights, and the scheme leaves those at full precision"
    return "an override leaves it at full precision"
