"""Preparing the working copy: what gets quantized is what gets deployed.

Parametrized weights (weight norm, spectral norm, anything of ``torch.nn.utils.parametrize``) are
replaced by the value that the forward pass uses, and batch norms folded into the layer before them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

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


def fold_batch_norm(model: nn.Module, batch: Tensor) -> Folding:
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
        graph = fx.symbolic_trace(clone).graph
    except Exception as error:  # fx raises many types on control flow it cannot follow
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        note = f"batch norm not folded: model cannot be traced ({why})"
        return Folding(clone, (), 0.0, (*notes, note))
    uses: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            uses[node.target] = uses.get(node.target, 0) + 1
    folded = []
    for node in graph.nodes:
        if node.op != "call_module" or uses[node.target] > 1:
            continue
        before = node.args[0] if node.args else None
        norm = clone.get_submodule(node.target)
        if not isinstance(norm, NORMS) or not isinstance(before, fx.Node):
            continue
        if before.op != "call_module" or len(before.users) > 1 or uses[str(before.target)] > 1:
            continue
        layer = clone.get_submodule(str(before.target))
        if isinstance(layer, FOLDABLE) and norm.running_var is not None:
            _fold(layer, norm)
            clone.set_submodule(node.target, nn.Identity())
            folded.append(node.target)
    difference = relative_difference(model, clone, batch)
    if not difference <= TOLERANCE:
        note = f"batch norm not folded: folding would change outputs by {difference:.1e} (relative)"
        return Folding(materialized(model, batch)[0], (), difference, (*notes, note))
    left = [n for n, m in clone.named_modules() if isinstance(m, NORMS)]
    notes += tuple(f"batch norm {name} could not be folded" for name in left)
    return Folding(clone, tuple(folded), difference, notes)


def materialized(model: nn.Module, batch: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy in evaluation mode whose weights are plain parameters, and what was changed for it."""
    with torch.no_grad():
        model.eval()(batch[:1])  # weight norm by hooks leaves its last weight on the module
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


def relative_difference(one: nn.Module, other: nn.Module, batch: Tensor) -> float:
    """Largest output difference of two models on a batch over the largest output, in float64."""
    with torch.no_grad():
        a = materialized(one, batch)[0].double()(batch.double())
        b = materialized(other, batch)[0].double()(batch.double())
    largest = float(a.abs().max())
    return float((a - b).abs().max()) / (largest if largest > 0 else 1.0)
