"""Resources: what a scheme saves, counted exactly from shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from halfstep.scheme import Scheme, Spec
from halfstep.sites import Operation, Sites
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


def resources(model: nn.Module, sites: Sites, scheme: Scheme | None) -> dict[str, float]:
    """Everything that is counted, by name; ``scheme`` None counts the reference."""
    stored = reference_bytes(model) if scheme is None else weight_bytes(model, sites, scheme)
    return {"weight_bytes": stored, "bit_operations": bit_operations(sites, scheme)}


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
        entering = [activations.get(name) for name in operation.activations]
        weight = weights.get(operation.weight) if operation.weight else None
        total += operation.macs * factor(operation, weight, entering)
    return total


def factor(operation: Operation, weight: Spec | None, entering: Sequence[Spec | None]) -> int:
    """Bits by bits of one multiply-accumulate of an operation."""
    inputs = [_bits(spec) for spec in entering]
    if operation.weight is not None:
        return _bits(weight) * max(inputs, default=FULL_BITS)
    if len(inputs) == 4:  # attention: query by key, and probabilities by value, half each
        return (inputs[0] * inputs[1] + inputs[2] * inputs[3]) // 2
    return math.prod(inputs)


def _bits(spec: Spec | None) -> int:
    return spec.format.bits if spec is not None else FULL_BITS
