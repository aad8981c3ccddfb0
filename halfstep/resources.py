"""Resources: what a scheme saves, counted exactly from shapes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from halfstep.scheme import Scheme
from halfstep.sites import Place, Site
from halfstep.weights import packed_bytes


def reference_bytes(model: nn.Module) -> int:
    """Bytes at rest of every parameter and buffer at full precision."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def weight_bytes(model: nn.Module, sites: Sequence[Site], scheme: Scheme) -> int:
    """Bytes at rest under a scheme: packed codes, scales, zero points, and all that stayed fp32."""
    total = reference_bytes(model)
    if scheme.weights is not None:
        for site in sites:
            weight = site.weight(model)
            saved = weight.numel() * weight.element_size()
            total += packed_bytes(weight.shape, scheme.weights) - saved
    return total


def bit_operations(places: Sequence[Place], scheme: Scheme | None) -> int:
    """Multiply-accumulates times weight bits times activation bits, for one example.

    The count of van Baalen et al. 2020 (Bayesian Bits, section 2.4); a side at full precision has
    32 bits. ``scheme`` None counts the reference.
    """
    weights = scheme.weights.format.bits if scheme and scheme.weights else 32
    activations = scheme.activations.format.bits if scheme and scheme.activations else 32
    return sum(p.macs * (weights * activations if p.quantized else 1024) for p in places)
