"""Preparing the working copy: what gets quantized is what gets deployed.

Parametrized weights (weight norm, spectral norm, anything of ``torch.nn.utils.parametrize``) are
replaced by the value that the forward pass uses, and batch norms folded into the layer before them.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from halfstep.batches import Batch, answer, first, forward, in_float64
from halfstep.errors import first_line

WATCHED = (
    "the model cannot be traced: batch norms were matched to layers by watching a forward pass"
)
FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-5
"""Largest accepted relative output difference, measured in float64: float32 weights round once."""


@dataclass(frozen=True, eq=False)
class Folding:
    """A copy of a model with its batch norms folded, and what is to be known about it."""

    model: nn.Module
    folded: tuple[str, ...]
    """Names of the batch norms that are gone."""
    max_relative_difference: float
    """Of the outputs on the checked batch, in float64, over the largest output."""
    notes: tuple[str, ...]


def fold_batch_norm(model: nn.Module, batch: Batch) -> Folding:
    """Folds every batch norm that follows one linear or convolution and nothing else reads.

    ``y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta`` becomes one convolution, computed in
    float64 and rounded once (Jacob et al. 2018, section 3.2). The model is not touched: the
    result is a copy, whose outputs on ``batch`` are compared with the original's. Where they
    differ by more than `TOLERANCE` nothing is folded and a note says so.
    """
    clone, notes = materialized(model, batch)
    if not any(isinstance(m, NORMS) for m in clone.modules()):
        return Folding(clone, (), 0.0, notes)
    try:
        pairs = _traced(clone)
    except Exception as error:  # fx raises many types on control flow it cannot follow
        notes = (*notes, f"{WATCHED} ({first_line(error)})")
        pairs = _watched(clone, batch)
    folded = []
    for before, name in pairs:
        layer, norm = clone.get_submodule(before), clone.get_submodule(name)
        if isinstance(layer, FOLDABLE) and isinstance(norm, NORMS) and norm.running_var is not None:
            _fold(layer, norm)
            clone.set_submodule(name, nn.Identity())
            folded.append(name)
    difference = relative_difference(model, clone, batch)
    if not difference <= TOLERANCE:
        note = f"batch norm not folded: folding would change outputs by {difference:.1e} (relative)"
        return Folding(materialized(model, batch)[0], (), difference, (*notes, note))
    left = [n for n, m in clone.named_modules() if isinstance(m, NORMS)]
    notes += tuple(f"batch norm {name} could not be folded" for name in left)
    return Folding(clone, tuple(folded), difference, notes)


def _traced(model: nn.Module) -> list[tuple[str, str]]:
    """Modules whose output enters one other module and nothing else, and that module; each is used
    once. From the traced graph."""
    nodes = [node for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    uses = Counter(node.target for node in nodes)
    pairs = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
            pairs.append((str(before.target), str(node.target)))
    return [pair for pair in pairs if uses[pair[0]] == uses[pair[1]] == 1]


def _watched(model: nn.Module, batch: Batch) -> list[tuple[str, str]]:
    """The same for a model that cannot be traced, by watching what layers hand to batch norms.

    Who else reads the tensor does not show here; the comparison of outputs will tell.
    """
    kept: list[tuple[str, Tensor]] = []  # keeps tensors alive, so that each is itself
    pairs: list[tuple[str, str]] = []
    uses: Counter[str] = Counter()
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def seen(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            uses[name] += 1
            if isinstance(module, FOLDABLE):
                kept.append((name, output))
                return
            pairs.extend((before, name) for before, x in kept if inputs and x is inputs[0])

        handles.append(module.register_forward_hook(seen))

    for name, module in model.named_modules():
        if isinstance(module, (*FOLDABLE, *NORMS)):
            watch(name, module)
    try:
        with torch.no_grad():
            forward(model, first(batch, 1))
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if uses[pair[0]] == uses[pair[1]] == 1]


def materialized(model: nn.Module, batch: Batch) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy in evaluation mode whose weights are plain parameters, and what was changed for it."""
    with torch.no_grad():
        # Weight norm by hooks leaves its last weight on the module.
        forward(model.eval(), first(batch, 1))
        clone = copy.deepcopy(model)
    notes = []
    for name, module in list(clone.named_modules()):
        if parametrize.is_parametrized(module):
            # Copies share the class that holds the parametrized property; taking the property off
            # would take it off the original too.
            own = {k: v for k, v in vars(type(module)).items() if k not in _OF_EVERY_CLASS}
            module.__class__ = type(type(module).__name__, type(module).__bases__, own)
            for parameter in list(module.parametrizations):
                parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
                notes.append(f"{name}.{parameter} is parametrized: its effective value is used")
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm | SpectralNorm):
                hook(module, ())
                hook.remove(module)
                del module._forward_pre_hooks[key]
                notes.append(f"{name}.{hook.name} is normalised: its effective value is used")
    for parameter in clone.parameters():
        parameter.requires_grad_(False)
    return clone, tuple(note.lstrip(".") for note in notes)


_OF_EVERY_CLASS = ("__dict__", "__weakref__")


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(norm.running_var, Tensor)
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.eps, float)
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if isinstance(norm.weight, Tensor):
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double()
    if isinstance(bias, Tensor):
        shift = shift + bias.double()
    offset = shift * factor
    if isinstance(norm.bias, Tensor):
        offset = offset + norm.bias.double()
    column = factor.reshape(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter((weight.double() * column).float(), requires_grad=False)
    layer.bias = nn.Parameter(offset.float(), requires_grad=False)


def relative_difference(one: nn.Module, other: nn.Module, batch: Batch) -> float:
    """Largest output difference of two models on a batch over the largest output, in float64."""
    with torch.no_grad():
        a, b = (
            answer(forward(materialized(model, batch)[0].double(), in_float64(batch)))
            for model in (one, other)
        )
    largest = float(a.abs().max())
    return float((a - b).abs().max()) / (largest if largest > 0 else 1.0)
