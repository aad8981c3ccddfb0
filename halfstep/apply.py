"""Applying a scheme to a model: a context that puts everything back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfstep.activations import DynamicQuantizer, StaticQuantizer
from halfstep.certificate import Certificate, certify
from halfstep.weights import QuantizedWeight


@dataclass(frozen=True, eq=False)
class Treatment:
    """What a scheme does at one site; None leaves that side at full precision."""

    weight: QuantizedWeight | None
    activation: StaticQuantizer | DynamicQuantizer | None


@contextmanager
def applied(model: nn.Module, treatments: Mapping[str, Treatment]) -> Iterator[nn.Module]:
    """The model, quantized while the context is open.

    Weights are exchanged, not overwritten: the original parameter objects go back on exit, also
    when the body raises. Run the model without gradients (`torch.no_grad`), and train nothing.
    """
    originals: list[tuple[nn.Module, nn.Parameter]] = []
    handles = []
    scratch: dict[torch.Size, _Scratch] = {}
    try:
        for name, treatment in treatments.items():
            module = model.get_submodule(name)
            if treatment.weight is not None:
                original = module.weight
                assert isinstance(original, nn.Parameter)
                originals.append((module, original))
                module.weight = nn.Parameter(treatment.weight.values, requires_grad=False)
            if treatment.activation is not None:
                hook = _hook(treatment.activation, scratch)
                handles.append(module.register_forward_pre_hook(hook))
        yield model
    finally:
        for module, original in originals:
            module.weight = original
        for handle in handles:
            handle.remove()


@dataclass
class _Scratch:
    """The quantized form of the last tensor of some shape, in a buffer that is used again.

    A fresh buffer for each batch costs as much as the quantization itself (the kernel zeroes its
    pages); and a tensor that enters two sites under equal qparams is quantized once.
    """

    buffer: Tensor
    source: weakref.ref[Tensor]
    version: int
    quantizer: StaticQuantizer

    def holds(self, x: Tensor, quantizer: StaticQuantizer) -> bool:
        known = self.source() is x and self.version == x._version
        return known and self.quantizer.same_as(quantizer)


def _hook(quantizer: StaticQuantizer | DynamicQuantizer, scratch: dict[torch.Size, _Scratch]):  # type: ignore[no-untyped-def]
    def quantize_static(x: Tensor) -> Tensor:
        assert isinstance(quantizer, StaticQuantizer)
        last = scratch.get(x.shape)
        if last is not None and last.holds(x, quantizer):
            return last.buffer
        buffer = last.buffer if last is not None else torch.empty_like(x)
        scratch[x.shape] = _Scratch(quantizer(x, out=buffer), weakref.ref(x), x._version, quantizer)
        return buffer

    def quantize_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        # A buffer may be written again only where nothing keeps it for a backward pass.
        plain = x.is_contiguous() and not x.is_inference() and not torch.is_grad_enabled()
        if plain and isinstance(quantizer, StaticQuantizer):
            return (quantize_static(x), *inputs[1:])
        return (quantizer(x), *inputs[1:])

    return quantize_input


@contextmanager
def certifying(
    model: nn.Module, treatments: Mapping[str, Treatment], into: list[Certificate]
) -> Iterator[None]:
    """While open, checks the quantization of every treated activation element by element.

    The model itself stays at full precision, so its activations are those of the reference.
    """

    def hook(name: str, quantizer: StaticQuantizer | DynamicQuantizer):  # type: ignore[no-untyped-def]
        def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            qparams = quantizer.qparams_for(x)
            into.append(certify(name, "activation", x, quantizer(x), qparams, quantizer.notes))

        return check

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name, treatment.activation))
        for name, treatment in treatments.items()
        if treatment.activation is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
