"""Treatments: from sketches and schemes to what is done at each site, each piece made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from halfstep.activations import DynamicQuantizer, StaticQuantizer, quantizer
from halfstep.apply import Treatment, certifying
from halfstep.certificate import Certificate, certify
from halfstep.scheme import Scheme, Spec
from halfstep.sites import Site, as_matrix
from halfstep.sketch import Sketch
from halfstep.weights import QuantizedWeight, quantize_weight

CERTIFIED_EXAMPLES = 16
"""Activation certificates check every element of this many examples."""


class Treatments:
    """Makes treatments for one model from one calibration; cells share every piece they have in
    common (a weight under a spec, an activation under a spec, their certificates)."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        sketches: Mapping[str, Sketch],
        examples: Tensor,
    ) -> None:
        """``examples``: inputs whose first `CERTIFIED_EXAMPLES` rows activations are checked on."""
        self._model = model
        self._sites = sites
        self._sketches = sketches
        self._examples = examples[:CERTIFIED_EXAMPLES]
        self._weights: dict[tuple[str, Spec], QuantizedWeight] = {}
        self._activations: dict[tuple[str, Spec], StaticQuantizer | DynamicQuantizer] = {}
        self._certificates: dict[tuple[str, Spec], tuple[Certificate, ...]] = {}

    def for_scheme(self, scheme: Scheme) -> dict[str, Treatment]:
        """What the scheme does at each site."""
        return {
            site.name: Treatment(
                self._weight(site, scheme.weights) if scheme.weights else None,
                self._activation(site, scheme.activations) if scheme.activations else None,
            )
            for site in self._sites
        }

    def certificates(self, scheme: Scheme) -> tuple[Certificate, ...]:
        """Every weight's and activation's certificate, weights first, in order of sites.

        Activations are checked on the full-precision model: the certificate is about the
        quantizer, and so serves every cell that uses it.

        Raises:
            BoundViolated: a bound does not hold.
        """
        found: tuple[Certificate, ...] = ()
        if scheme.weights:
            key = ("weight", scheme.weights)
            if key not in self._certificates:
                self._certificates[key] = self._certify_weights(scheme.weights)
            found += self._certificates[key]
        if scheme.activations:
            key = ("activation", scheme.activations)
            if key not in self._certificates:
                self._certificates[key] = self._certify_activations(scheme)
            found += self._certificates[key]
        return found

    def _weight(self, site: Site, spec: Spec) -> QuantizedWeight:
        key = (site.name, spec)
        if key not in self._weights:
            self._weights[key] = quantize_weight(site.weight(self._model), spec)
        return self._weights[key]

    def _activation(self, site: Site, spec: Spec) -> StaticQuantizer | DynamicQuantizer:
        key = (site.name, spec)
        if key not in self._activations:
            self._activations[key] = quantizer(site.kind, self._sketches.get(site.name), spec)
        return self._activations[key]

    def _certify_weights(self, spec: Spec) -> tuple[Certificate, ...]:
        certificates = []
        for site in self._sites:
            quantized = self._weight(site, spec)
            certificates.append(
                certify(
                    site.name,
                    "weight",
                    as_matrix(site.weight(self._model)),
                    as_matrix(quantized.values),
                    quantized.broadcast(),
                    quantized.notes,
                )
            )
        return tuple(certificates)

    def _certify_activations(self, scheme: Scheme) -> tuple[Certificate, ...]:
        found: list[Certificate] = []
        with torch.inference_mode(), certifying(self._model, self.for_scheme(scheme), found):
            self._model(self._examples)
        return tuple(found)


def qparams_tensors(treatments: Mapping[str, Treatment]) -> dict[str, Tensor]:
    """Scales and zero points by site, for safetensors. Dynamic activations have none to keep."""
    tensors: dict[str, Tensor] = {}
    for name, treatment in treatments.items():
        if treatment.weight is not None:
            tensors[f"{name}.weight.scale"] = treatment.weight.qparams.scale.contiguous()
            tensors[f"{name}.weight.zero_point"] = treatment.weight.qparams.zero_point.contiguous()
        if isinstance(treatment.activation, StaticQuantizer):
            tensors[f"{name}.input.scale"] = treatment.activation.qparams.scale.contiguous()
            tensors[f"{name}.input.zero_point"] = (
                treatment.activation.qparams.zero_point.contiguous()
            )
    return tensors
