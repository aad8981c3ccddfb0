"""Resources: what a scheme saves, counted exactly from shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from halfstep.scheme import Scheme, Spec
from halfstep.sites import Sites
from halfstep.weights import packed_bits, packed_bytes

FULL_BITS = 32


def reference_bytes(model: nn.Module) -> int:
    """Bytes at rest of every parameter and buffer at full precision; tied ones count once."""
    return sum(t.numel() * t.element_size() for t in _distinct(model))


def _distinct(model: nn.Module) -> Iterable[Tensor]:
    """Parameters and persistent buffers, each storage once."""
    seen: dict[tuple[int, int], Tensor] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            seen.setdefault((tensor.untyped_storage().data_ptr(), tensor.data_ptr()), tensor)
    return seen.values()


def weight_bytes(model: nn.Module, sites: Sites, scheme: Scheme) -> int:
    """Bytes at rest under a scheme: packed codes, scales, zero points, and all that stayed fp32."""
    total = reference_bytes(model)
    for site in sites.weights:
        spec = scheme.weight_spec(site, sites)
        if spec is not None:
            weight = site.read(model)
            total -= weight.numel() * weight.element_size()
            total += packed_bytes(site.layout.shape, spec)
    return total


def bits_per_weight(sites: Sites, scheme: Scheme) -> float:
    """Bits of one quantized weight, its share of scales and zero points included."""
    bits = count = 0
    for site in sites.weights:
        spec = scheme.weight_spec(site, sites)
        if spec is not None:
            bits += packed_bits(site.layout.shape, spec)
            count += math.prod(site.layout.shape)
    return bits / count if count else float(FULL_BITS)


def bit_operations(sites: Sites, scheme: Scheme | None) -> int:
    """Multiply-accumulates times the bits of both factors, for one example.

    The count of van Baalen et al. 2020 (Bayesian Bits, section 2.4); a side at full precision has
    32 bits. ``scheme`` None counts the reference.
    """
    weights: dict[str, Spec | None] = {}
    activations: dict[str, Spec | None] = {}
    if scheme is not None:
        weights = {s.name: scheme.weight_spec(s, sites) for s in sites.weights}
        activations = {s.name: scheme.activation_spec(s, sites) for s in sites.activations}
    total = sum(other.macs for other in sites.elsewhere) * FULL_BITS**2
    for operation in sites.operations:
        inputs = [_bits(activations.get(name)) for name in operation.activations]
        if operation.weight is not None:
            factor = _bits(weights.get(operation.weight)) * max(inputs, default=FULL_BITS)
        elif len(inputs) == 4:  # attention: query by key, and probabilities by value, half each
            factor = (inputs[0] * inputs[1] + inputs[2] * inputs[3]) // 2
        else:
            factor = math.prod(inputs)
        total += operation.macs * factor
    return total


def _bits(spec: Spec | None) -> int:
    return spec.format.bits if spec is not None else FULL_BITS
