"""Treatments: from observations and schemes to what is done at each site, each piece made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from halfstep.accumulators import Accumulator, accumulators
from halfstep.activations import TreatedActivation, quantizer
from halfstep.apply import Treatment, certify_activations, exchanged
from halfstep.batches import Batch, first
from halfstep.certificate import Certificate, certify
from halfstep.corrections import BiasCorrection, Correction, CrossLayerEqualization, SmoothQuant
from halfstep.digest import digest_json, digest_tensors
from halfstep.granularity import PerPosition
from halfstep.integer import Integers, Proof
from halfstep.layout import Layout
from halfstep.moments import Moments, gather
from halfstep.observation import Observation
from halfstep.observe import calibrate
from halfstep.rewrites import Rewrite, rewritten
from halfstep.scheme import Scheme, Spec
from halfstep.sites import ActivationSite, Sites, WeightSite
from halfstep.weights import QuantizedWeight, quantize_weight

WeightKey = tuple[str, Spec, tuple[Correction, ...]]
"""A weight's site, and what is done to it."""
CERTIFIED_EXAMPLES = 16
"""Activation certificates check every element of this many examples."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What may be asked of the calibration data."""

    batches: Callable[[], Iterable[Batch]]
    """In canonical order; called anew for each pass."""
    examples: int
    observations: Mapping[str, Observation] = field(default_factory=dict)
    """From the one pass that every static scheme shares, by activation site."""
    positions: bool = False


class Shelf(Protocol):
    """Keeps weights that took long to quantize: what a correction rounded, or searched for. The
    same weight, met by the same inputs, comes to the same bits in every version of a model."""

    def get(self, key: str) -> QuantizedWeight | None: ...

    def put(self, key: str, weight: QuantizedWeight) -> None: ...


class Treatments:
    """Makes treatments for one model from one calibration.

    Cells share every piece they have in common: a weight under a spec and its corrections, an
    activation under a spec, the moments that corrections need, the observations of a rewritten
    model, and all certificates.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        calibration: Calibration,
        probe: Batch,
        shelf: Shelf | None = None,
    ) -> None:
        """
        Args:
            probe: a batch whose first `CERTIFIED_EXAMPLES` rows activations are checked on.
            shelf: where corrected weights are kept beyond this process.
        """
        self._shelf = shelf
        self._model = model
        self._sites = sites
        self._calibration = calibration
        self._probe = first(probe, CERTIFIED_EXAMPLES)
        self._moments: dict[str, Moments] | None = None
        self._rewrites: dict[tuple[Correction, ...], Rewrite] = {}
        self._observed: dict[tuple[Correction, ...], Mapping[str, Observation]] = {}
        self._weights: dict[WeightKey, QuantizedWeight] = {}
        self._start()

    def _start(self) -> None:
        self._activations: dict[
            tuple[str, Spec | None, tuple[Correction, ...]], TreatedActivation
        ] = {}
        self._certificates: dict[object, Certificate] = {}
        self._made: dict[Scheme, Treatment] = {}
        self._integers: Integers | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without what was made for schemes: a worker makes it, or gets the weights by `adopt`."""
        left = ("_weights", "_activations", "_certificates", "_made", "_integers", "_shelf")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._weights = {}
        self._shelf = None
        self._start()

    def gather(self, schemes: Iterable[Scheme]) -> None:
        """Runs the passes over the calibration data that these schemes need, so that a copy of
        this runs none."""
        for scheme in schemes:
            rewrites = _rewrites(scheme)
            self._rewrite(rewrites)
            if scheme.needs_sketches:
                self._observations(rewrites)
            if len(rewrites) < len(scheme.corrections):
                self._all_moments()

    def weight_keys(self, scheme: Scheme) -> list[WeightKey]:
        """The quantized weights that a scheme needs."""
        corrections = tuple(c for c in scheme.corrections if c.stage != "bias")
        return [
            (site.name, spec, corrections)
            for site in self._sites.weights
            if (spec := scheme.weight_spec(site, self._sites)) is not None
        ]

    def quantize(self, keys: Sequence[WeightKey]) -> dict[WeightKey, QuantizedWeight]:
        """These weights, each made once."""
        sites = {site.name: site for site in self._sites.weights}
        for key in keys:
            name, spec, corrections = key
            if key not in self._weights:
                self._weights[key] = self._quantized(sites[name], spec, corrections)
        return {key: self._weights[key] for key in keys}

    def adopt(self, weights: Mapping[WeightKey, QuantizedWeight]) -> None:
        """Takes weights that were quantized elsewhere."""
        for key, weight in weights.items():
            self._weights.setdefault(key, weight)

    def for_scheme(self, scheme: Scheme) -> Treatment:
        """What the scheme does to the model, whatever runs it."""
        scheme = scheme.simulation
        if scheme not in self._made:
            self._made[scheme] = self._make(scheme)
        return self._made[scheme]

    def _make(self, scheme: Scheme) -> Treatment:
        rewrites = _rewrites(scheme)
        rewrite = self._rewrite(rewrites)
        made = self.quantize(self.weight_keys(scheme))
        weights = {name: weight for (name, _, _), weight in made.items()}
        parameters = self._spread(rewrite.parameters)
        notes = list(rewrite.notes)
        for site in self._sites.weights:
            if site.name in weights:
                parameters |= dict.fromkeys(site.parameters, weights[site.name].values)
        if any(isinstance(c, BiasCorrection) for c in scheme.corrections):
            biases, told = self._corrected_biases(weights, rewrite)
            parameters |= biases
            notes += told
        activations = {}
        for active in self._sites.activations:
            spec = scheme.activation_spec(active, self._sites)
            if spec is not None or active.name in rewrite.divisors:
                activations[active.name] = self._activation(active, spec, rewrites)
        known = frozenset(site.name for site in self._sites.activations)
        return Treatment(parameters, activations, weights, known, tuple(notes))

    def unquantized(self, scheme: Scheme) -> Treatment:
        """The scheme's rewrites and divisors, with every site at full precision."""
        rewrite = self._rewrite(_rewrites(scheme))
        activations = {
            site.name: self._activation(site, None, _rewrites(scheme))
            for site in self._sites.activations
            if site.name in rewrite.divisors
        }
        known = frozenset(site.name for site in self._sites.activations)
        return Treatment(self._spread(rewrite.parameters), activations, {}, known)

    def corrected_bias(self, scheme: Scheme, site: WeightSite) -> list[str]:
        """The name of the bias that bias correction changes for a weight, if it does."""
        if not any(isinstance(c, BiasCorrection) for c in scheme.corrections):
            return []
        found = self._bias_of(site.name)
        return [found[0]] if found and found[0] in self.for_scheme(scheme).parameters else []

    def certificates(self, scheme: Scheme) -> tuple[Certificate, ...]:
        """Every weight's and activation's certificate, weights first, in order of sites.

        Activations are checked on the full-precision model: the certificate is about the
        quantizer, and so serves every cell that uses it.

        Raises:
            BoundViolated: a bound does not hold.
        """
        treatment = self.for_scheme(scheme)
        found = [self._certified_weight(name, w) for name, w in treatment.weights.items()]
        keys = {name: id(t) for name, t in treatment.activations.items() if t.quantizer is not None}
        if not all(key in self._certificates for key in keys.values()):
            rewrite = self._rewrite(_rewrites(scheme))
            plain = replace(treatment, parameters=self._spread(rewrite.parameters))
            for certificate in certify_activations(self._model, plain, self._probe):
                self._certificates[keys[certificate.site]] = certificate
        found += [self._certificates[key] for key in keys.values() if key in self._certificates]
        return tuple(found)

    @property
    def integers(self) -> Integers:
        """Integer products, with what this machine runs them by."""
        if self._integers is None:
            self._integers = Integers()
        return self._integers

    def proofs(self, scheme: Scheme) -> tuple[Proof, ...]:
        """The scheme's integer products, each computed in both ways on the probe."""
        return self.integers.prove(self._model, self.for_scheme(scheme), self._probe)

    @contextmanager
    def applied(self, scheme: Scheme) -> Iterator[nn.Module]:
        """The model under the scheme while open, with integer arithmetic where it qualifies."""
        treatment, proofs = self.for_scheme(scheme), self.proofs(scheme)
        with self.integers.applied(self._model, treatment, proofs) as model:
            yield model

    def accumulators(self, scheme: Scheme) -> tuple[Accumulator, ...]:
        """Bounds on the int32 accumulators of the scheme's integer products."""
        treatment = self.for_scheme(scheme)
        biases = {}
        for operation in self._sites.operations:
            bias = self._bias_of(operation.weight) if operation.weight else None
            name, tensor = bias if bias else ("", None)
            if tensor is not None:
                biases[operation.name] = treatment.parameters.get(name, tensor)
        return accumulators(treatment, self._sites, biases)

    def _rewrite(self, corrections: tuple[Correction, ...]) -> Rewrite:
        if corrections not in self._rewrites:
            rewrite = Rewrite()
            for correction in corrections:
                assert isinstance(correction, CrossLayerEqualization | SmoothQuant)
                rewrite = rewritten(
                    rewrite, correction, self._model, self._sites, self._all_moments
                )
            self._rewrites[corrections] = rewrite
        return self._rewrites[corrections]

    def _all_moments(self) -> dict[str, Moments]:
        """Of every weight's input: one pass, made when the first correction asks for it."""
        if self._moments is None:
            wanted = [site.name for site in self._sites.weights]
            self._moments = gather(self._model, self._sites, self._calibration.batches(), wanted)
        return self._moments

    def _observations(self, corrections: tuple[Correction, ...]) -> Mapping[str, Observation]:
        """Of the model as rewritten: a rewrite needs a pass of its own."""
        rewrite = self._rewrite(corrections)
        if rewrite.nothing:
            return self._calibration.observations
        if corrections not in self._observed:
            divided = {
                site.name: TreatedActivation(site.operand, None, rewrite.divisors[site.name])
                for site in self._sites.activations
                if site.name in rewrite.divisors
            }
            known = self._calibration.observations
            with exchanged(self._model, self._spread(rewrite.parameters)):
                self._observed[corrections] = calibrate(
                    self._model,
                    [site for site in self._sites.activations if site.name in known],
                    self._calibration.batches(),
                    treated=divided,
                    positions=self._calibration.positions,
                    examples=self._calibration.examples,
                )
        return self._observed[corrections]

    def _spread(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters under every name that holds them."""
        spread = dict(parameters)
        for site in self._sites.weights:
            if site.parameters[0] in parameters:
                spread |= dict.fromkeys(site.parameters, parameters[site.parameters[0]])
        return spread

    def _quantized(
        self, site: WeightSite, spec: Spec, corrections: tuple[Correction, ...]
    ) -> QuantizedWeight:
        rewrite = self._rewrite(tuple(c for c in corrections if c.stage == "rewrite"))
        own = tuple(c for c in corrections if c.stage in ("scale", "rounding"))
        moments = self._all_moments().get(site.name) if own else None
        if moments is not None:
            moments = rewrite.moments(site, moments)
        weight, rewritten = (
            rewrite.weight(site, self._model),
            site.parameters[0] in rewrite.parameters,
        )

        def made() -> QuantizedWeight:
            return quantize_weight(weight, spec, site.layout, own, moments, rewritten=rewritten)

        if self._shelf is None or not own:
            return made()
        key = _weight_digest(weight, spec, site.layout, own, moments, rewritten)
        found = self._shelf.get(key)
        if found is None:
            found = made()
            self._shelf.put(key, found)
        return found

    def _activation(
        self, site: ActivationSite, spec: Spec | None, corrections: tuple[Correction, ...]
    ) -> TreatedActivation:
        key = (site.name, spec, corrections)
        if key not in self._activations:
            made = None
            if spec is not None:
                observation = self._observations(corrections).get(site.name)
                made = quantizer(site.operand, observation, spec)
            divisor = self._rewrite(corrections).divisors.get(site.name)
            self._activations[key] = TreatedActivation(site.operand, made, divisor)
        return self._activations[key]

    def _corrected_biases(
        self, weights: Mapping[str, QuantizedWeight], rewrite: Rewrite
    ) -> tuple[dict[str, Tensor], list[str]]:
        moments = self._all_moments()
        parameters: dict[str, Tensor] = {}
        notes = []
        for site in self._sites.weights:
            if site.name not in weights:
                continue
            found = self._bias_of(site.name)
            if found is None or site.name not in moments:
                why = "it has no bias" if found is None else "its inputs are not known row by row"
                notes.append(f"bias_correction does not apply to {site.name}: {why}")
                continue
            name, bias = found
            own = rewrite.moments(site, moments[site.name])
            quantized = weights[site.name]
            original = site.layout.matrix(rewrite.weight(site, self._model))
            values = site.layout.matrix(quantized.values)
            shift = BiasCorrection().shift(values - original, own)
            before = rewrite.parameters.get(name, bias)
            start = before.double() if before is not None else torch.zeros_like(shift)
            parameters[name] = (start - shift).float()
        return parameters, notes

    def _bias_of(self, weight: str) -> tuple[str, Tensor | None] | None:
        """Name and value of the bias that belongs to a weight; the value is None where the module
        could have one and has none. None where there is no place for a bias."""
        site = next(s for s in self._sites.weights if s.name == weight)
        owner, _, own = site.parameters[0].rpartition(".")
        module = self._model.get_submodule(owner)
        name = own.replace("weight", "bias")
        if name == own or not hasattr(module, name):
            return None
        bias = getattr(module, name)
        return f"{owner}.{name}".lstrip("."), bias.detach() if bias is not None else None

    def _certified_weight(self, name: str, weight: QuantizedWeight) -> Certificate:
        if id(weight) not in self._certificates:
            self._certificates[id(weight)] = certify(
                name,
                "weight",
                weight.target,
                weight.rounded,
                weight.broadcast(),
                weight.notes,
                gaps=weight.gaps,
                of=weight.of,
            )
        return self._certificates[id(weight)]


def _weight_digest(
    weight: Tensor,
    spec: Spec,
    layout: Layout,
    corrections: tuple[Correction, ...],
    moments: Moments | None,
    rewritten: bool,
) -> str:
    """Of everything that `quantize_weight` reads."""
    tensors = {"weight": weight}
    if moments is not None:
        tensors |= {"mean": moments.mean, "gram": moments.gram,
                    "magnitude": moments.magnitude, "amax": moments.amax}  # fmt: skip
    return digest_json(
        {
            "tensors": digest_tensors(tensors),
            "kernel": moments.kernel if moments is not None else None,
            "spec": spec.to_json(),
            "layout": [list(layout.view), list(layout.rows)],
            "corrections": [correction.to_json() for correction in corrections],
            "rewritten": rewritten,
        }
    )


def _rewrites(scheme: Scheme) -> tuple[Correction, ...]:
    return tuple(c for c in scheme.corrections if c.stage == "rewrite")


def needs_positions(schemes: Iterable[Scheme]) -> bool:
    """True where some scheme fixes a scale for each token position."""
    return any(isinstance(s.granularity, PerPosition) for c in schemes for s in c.activation_specs)


def qparams_tensors(treatment: Treatment) -> dict[str, Tensor]:
    """Scales, zero points and corrections by site, for safetensors. Dynamic activations have none
    to keep."""
    tensors: dict[str, Tensor] = {}
    for name, weight in treatment.weights.items():
        tensors[f"{name}.weight.scale"] = weight.qparams.scale.contiguous()
        tensors[f"{name}.weight.zero_point"] = weight.qparams.zero_point.contiguous()
        if weight.scaling is not None:
            tensors[f"{name}.weight.scaling"] = weight.scaling.contiguous()
    for name, treated in treatment.activations.items():
        qparams = getattr(treated.quantizer, "qparams", None)
        if qparams is not None:
            tensors[f"{name}.input.scale"] = qparams.scale.contiguous()
            tensors[f"{name}.input.zero_point"] = qparams.zero_point.contiguous()
        if treated.divisor is not None:
            tensors[f"{name}.input.divisor"] = treated.divisor.contiguous()
    return tensors


def code_tensors(treatment: Treatment) -> dict[str, Tensor]:
    """The codes of every quantized weight, as a matrix ``[out, reduction]`` in its format's storage
    dtype, by site; with the scales and zero points of `qparams_tensors` they give its values."""
    return {
        f"{name}.weight.codes": weight.codes().contiguous()
        for name, weight in treatment.weights.items()
    }
