"""Applying a scheme to a model: a context that puts everything back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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
    when the body raises. Nothing may train or replace parameters meanwhile.
    """
    originals: list[tuple[nn.Module, nn.Parameter]] = []
    handles = []
    try:
        for name, treatment in treatments.items():
            module = model.get_submodule(name)
            if treatment.weight is not None:
                original = module.weight
                assert isinstance(original, nn.Parameter)
                originals.append((module, original))
                module.weight = nn.Parameter(treatment.weight.values, requires_grad=False)
            if treatment.activation is not None:
                handles.append(module.register_forward_pre_hook(_hook(treatment.activation)))
        yield model
    finally:
        for module, original in originals:
            module.weight = original
        for handle in handles:
            handle.remove()


def _hook(quantizer: StaticQuantizer | DynamicQuantizer):  # type: ignore[no-untyped-def]
    def quantize_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (quantizer(inputs[0]), *inputs[1:])

    return quantize_input


@contextmanager
def certifying(
    model: nn.Module, treatments: Mapping[str, Treatment], into: list[Certificate]
) -> Iterator[None]:
    """While open, checks every quantized activation of ``model`` element by element.

    Enter before `applied`, so that the sites' full-precision inputs are what is checked.
    """

    def hook(name: str, quantizer: StaticQuantizer | DynamicQuantizer):  # type: ignore[no-untyped-def]
        def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            into.append(
                certify(
                    name,
                    "activation",
                    x,
                    quantizer(x),
                    quantizer.qparams_for(x),
                    notes=quantizer.notes,
                )
            )

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
