"""What backends of integer kernels take: the reasons for which they refuse a scheme."""

from __future__ import annotations

from halfstep.corrections import Awq
from halfstep.formats import Uniform
from halfstep.granularity import PerAxis, PerTensor
from halfstep.scheme import Scheme, Spec
from halfstep.sites import Sites

READABLE = ("linear", "conv1d", "conv2d", "conv3d", "embedding")


def refused_weights(scheme: Scheme, sites: Sites) -> str:
    """Weights are stored as int8 codes with a scale for the tensor or for each channel."""
    if scheme.weights is None:
        return "the scheme leaves weights at full precision, so no integer kernel can run"
    for site in sites.weights:
        spec = scheme.weight_spec(site, sites)
        if spec is None:
            continue
        if site.kind not in READABLE:
            return f"weight {site.name} enters a {site.kind}, which has no integer kernel"
        reason = _not_int8(spec)
        if not reason and not (isinstance(spec.format, Uniform) and spec.format.symmetric):
            reason = f"{spec.format.name} has zero points, weights of integer kernels have none"
        if not reason and not isinstance(spec.granularity, PerTensor | PerAxis):
            reason = f"scales {spec.granularity} where kernels take one, or one a channel"
        if reason:
            return f"weight {site.name}: {reason}"
    if any(isinstance(c, Awq) for c in scheme.corrections):
        return "awq leaves weights off the integer grid"
    return ""


def refused_activations(scheme: Scheme, sites: Sites) -> str:
    """Activations have one static scale."""
    for site in sites.activations:
        spec = scheme.activation_spec(site, sites)
        if spec is None:
            continue
        if site.kind == "recurrent":
            return f"activation {site.name} is inside a recurrent layer"
        reason = _not_int8(spec)
        if not reason and not isinstance(spec.granularity, PerTensor):
            reason = f"scales {spec.granularity} where its kernels take one static scale"
        if reason:
            return f"activation {site.name}: {reason}"
    return ""


def _not_int8(spec: Spec) -> str:
    fmt = spec.format
    if not isinstance(fmt, Uniform):
        return f"{fmt.name} is not an integer format"
    if fmt.bits != 8:
        return f"{fmt.name} has {fmt.bits} bits, and its kernels on this kind of CPU multiply 8"
    return ""
