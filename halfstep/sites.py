"""Sites: the places of a subject where numbers get quantized, and the ledger of all places."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
"""Module types that are quantized, and the kind a site of that type has."""

ELEMENTWISE = "no multiply-accumulates: stays at full precision"


@dataclass(frozen=True)
class Site:
    """A module whose weight and whose input get quantized."""

    name: str
    kind: str

    def weight(self, model: nn.Module) -> Tensor:
        weight = model.get_submodule(self.name).weight
        assert isinstance(weight, Tensor)
        return weight.detach()


@dataclass(frozen=True)
class Place:
    """One row of the coverage ledger: a place that computes or holds parameters."""

    name: str
    kind: str
    parameters: int
    macs: int
    """Multiply-accumulates for one example."""
    quantized: bool
    reason: str
    """Why it is not quantized; empty where it is."""


def discover(model: nn.Module) -> tuple[Site, ...]:
    """Every site of a model, in the order of its modules."""
    return tuple(
        Site(name, KINDS[type(module)])
        for name, module in model.named_modules()
        if type(module) in KINDS
    )


def select(sites: Sequence[Site], skip: Sequence[str]) -> tuple[Site, ...]:
    """The sites that no skip pattern (shell style: ``head*``) names."""
    return tuple(s for s in sites if not any(fnmatch.fnmatch(s.name, p) for p in skip))


def coverage(
    model: nn.Module,
    example: Tensor,
    sites: Sequence[Site],
    skip: Sequence[str],
    folded: Sequence[str] = (),
) -> tuple[Place, ...]:
    """The ledger: every module that could have been quantized, and whether it was or why not.

    Multiply-accumulates come from torch's own count over every operator of one forward pass, so
    a matmul outside any known module shows up as a place of its own.

    Args:
        example: a batch of one, as the model takes it.
        skip: the patterns that took sites away.
        folded: names of batch norms that were folded into the layer before them.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(example)
    per_module = {
        name.split(".", 1)[1]: sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if "." in name
    }
    total = counter.get_total_flops() // 2
    chosen = {site.name for site in sites}
    places: list[Place] = []
    for name, module in model.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        leaf = next(module.children(), None) is None
        if not own and not leaf:
            continue
        macs = per_module.get(name, 0) if leaf else 0
        kind = KINDS.get(type(module), type(module).__name__)
        reason = ""
        if name in folded:
            kind, reason = "batch norm", "folded into the layer before it"
        elif name not in chosen:
            if type(module) in KINDS:
                pattern = next(p for p in skip if fnmatch.fnmatch(name, p))
                reason = f"skipped by pattern {pattern!r}"
            elif own or macs:
                reason = f"modules of type {type(module).__name__} are not quantized"
            else:
                reason = ELEMENTWISE
        places.append(Place(name, kind, own, macs, not reason, reason))
    elsewhere = total - sum(place.macs for place in places)
    if elsewhere > 0:
        reason = "matrix products outside the quantized modules"
        places.append(Place("(functional)", "functional", 0, elsewhere, False, reason))
    return tuple(places)


def as_matrix(weight: Tensor) -> Tensor:
    """A weight as ``[out, reduction]``: what one output's accumulator runs over is one row."""
    return weight.reshape(weight.shape[0], -1)
