"""Applying a scheme to a model: a context that puts everything back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfstep.activations import StaticQuantizer, TreatedActivation
from halfstep.batches import Batch, forward
from halfstep.certificate import Certificate, certify
from halfstep.errors import UserError
from halfstep.identity import Identity
from halfstep.intercept import Interception, Visitor
from halfstep.operators import TERMS, Operand
from halfstep.qparams import NotFinite
from halfstep.weights import QuantizedWeight


@dataclass(frozen=True, eq=False)
class Treatment:
    """What a scheme does to a model."""

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """What stands in place of parameters, by every name that holds one; a bias that the model does
    not have is added."""
    activations: Mapping[str, TreatedActivation] = field(default_factory=dict)
    """By site."""
    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    """By site; their values are among ``parameters``."""
    known: frozenset[str] = frozenset()
    """Every activation site that discovery found, treated or not."""
    notes: tuple[str, ...] = ()


SCRATCH_SHAPES = 16
"""Buffers for quantized activations that are kept, one a shape."""


class UnknownSite(Exception):
    """A product ran that discovery and calibration never saw: control flow depends on the data."""


@contextmanager
def applied(model: nn.Module, treatment: Treatment) -> Iterator[nn.Module]:
    """The model, quantized while the context is open.

    Parameters are exchanged, not overwritten: the original objects go back on exit, also when the
    body raises. Run the model without gradients (`torch.no_grad`), and train nothing.

    Raises:
        UnknownSite: where activations are treated, a product ran that discovery did not see.
    """
    with exchanged(model, treatment.parameters):
        mode = Interception(quantizing(treatment), alters=True)
        with mode.over(model) if treatment.activations else nullcontext():
            yield model


@contextmanager
def exchanged(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Other tensors in place of some parameters while the context is open."""
    originals: list[tuple[nn.Module, str, object]] = []
    made: dict[int, nn.Parameter] = {}
    try:
        for path, value in parameters.items():
            owner, _, name = path.rpartition(".")
            module = model.get_submodule(owner)
            originals.append((module, name, getattr(module, name)))
            # Tied weights stay one object.
            new = made.setdefault(id(value), nn.Parameter(value, requires_grad=False))
            setattr(module, name, new)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


@dataclass
class _Scratch:
    """The quantized form of the last tensor of some shape, in a buffer that is used again.

    A fresh buffer for each batch costs as much as the quantization itself (the kernel zeroes its
    pages); and a tensor that enters two sites under equal qparams is quantized once.
    """

    buffer: Tensor
    source: Identity
    quantizer: StaticQuantizer

    def holds(self, x: Tensor, quantizer: StaticQuantizer) -> bool:
        return self.source.still(x) and self.quantizer.same_as(quantizer)


def quantizing(treatment: Treatment) -> Visitor:
    """The visitor that treats every activation that enters a product."""
    return _Quantize(treatment)


class _Quantize:
    def __init__(self, treatment: Treatment) -> None:
        self._treated = treatment.activations
        self._known = treatment.known
        self._scratch: dict[torch.Size, _Scratch] = {}

    def __call__(self, site: str, operand: Operand, x: Tensor) -> Tensor:
        treated = self._treated.get(site)
        if treated is None:
            if site not in self._known and operand.role not in TERMS:
                raise UnknownSite(
                    f"{site} ran in evaluation but not on the example that sites were found with: "
                    "the model's control flow depends on its data"
                )
            return x
        quantizer = treated.quantizer
        if treated.divisor is not None:
            x = treated.divided(x)
        elif (
            isinstance(quantizer, StaticQuantizer)
            # A buffer may be written again only where nothing keeps it for a backward pass, and
            # where the product reads it before the next activation of its shape comes.
            and operand.role == "input"
            and x.is_contiguous()
            and not x.is_inference()
            and not torch.is_grad_enabled()
        ):
            return self._static(quantizer, x)
        if quantizer is None:
            return x
        try:
            return quantizer(x)
        except NotFinite:
            raise UserError(f"activations entering {site} hold NaN or infinite values") from None

    def _static(self, quantizer: StaticQuantizer, x: Tensor) -> Tensor:
        last = self._scratch.get(x.shape)
        if last is not None and last.holds(x, quantizer):
            return last.buffer
        if last is None and len(self._scratch) >= SCRATCH_SHAPES:  # texts come in many lengths
            self._scratch.pop(next(iter(self._scratch)))
        buffer = last.buffer if last is not None else torch.empty_like(x)
        self._scratch[x.shape] = _Scratch(quantizer(x, out=buffer), Identity.of(x), quantizer)
        return buffer


def certify_activations(model: nn.Module, treatment: Treatment, batch: Batch) -> list[Certificate]:
    """Checks every treated activation of one batch element by element.

    The activations are those of the treated parameters' model at full precision: each is what a
    correction makes of it, before it is quantized, so the certificate is about the quantizer alone.
    """
    seen: dict[str, list[Tensor]] = {}

    def collect(site: str, operand: Operand, x: Tensor) -> Tensor:
        treated = treatment.activations.get(site)
        if treated is None:
            return x
        x = treated.divided(x)
        if treated.quantizer is not None:
            seen.setdefault(site, []).append(x.detach().clone())
        return x

    mode = Interception(collect, alters=True)
    with torch.no_grad(), exchanged(model, treatment.parameters), mode.over(model):
        forward(model, batch)
    return [_certified(site, treatment.activations[site], xs) for site, xs in seen.items()]


def _certified(site: str, treated: TreatedActivation, xs: list[Tensor]) -> Certificate:
    """One certificate over everything that entered a site: a recurrent one is entered each step."""
    assert treated.quantizer is not None
    x = xs[0] if len(xs) == 1 else torch.cat(xs)
    quantizer = treated.quantizer
    return certify(
        site,
        "activation",
        x,
        quantizer(x),
        quantizer.qparams_for(x),
        quantizer.notes,
        of="activation" if treated.divisor is None else "scaled activation",
    )
