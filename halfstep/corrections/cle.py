"""Cross-layer equalization: give both sides of a layer boundary the same channel ranges."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from halfstep.corrections.parameters import Parameters

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
HOMOGENEOUS_MODULES = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.MaxPool1d, nn.MaxPool2d,
    nn.AvgPool1d, nn.AvgPool2d,
)  # fmt: skip
HOMOGENEOUS_FUNCTIONS = (F.relu, torch.relu, F.leaky_relu, F.dropout, F.max_pool2d, F.avg_pool2d)
HOMOGENEOUS_METHODS = ("relu", "relu_", "contiguous")
"""What commutes with a positive factor of each channel: ``f(s x) = s f(x)``."""
ROUNDS = 50
CONVERGED = 1e-6


@dataclass(frozen=True)
class CrossLayerEqualization(Parameters):
    """Nagel et al. 2019, section 4.1: ``s_i = sqrt(r1_i * r2_i) / r2_i``, so that both layers end
    with the range ``sqrt(r1_i * r2_i)`` in channel i; pair by pair until nothing moves."""

    name: ClassVar[str] = "cle"
    stage: ClassVar[str] = "rewrite"

    def equalize(
        self, layers: Mapping[str, nn.Module], pairs: Sequence[tuple[str, str]]
    ) -> dict[str, Tensor]:
        """The factors (float64) that the inputs of second layers were divided by, by their name.

        Changes weights and biases of ``layers`` in place, in float64 arithmetic rounded at the end.
        """
        weights = {n: m.weight.detach().double() for n, m in layers.items()}  # type: ignore[operator]
        biases = {
            n: m.bias.detach().double() for n, m in layers.items() if isinstance(m.bias, Tensor)
        }
        total = {second: torch.ones(len(weights[first])).double() for first, second in pairs}
        for _ in range(ROUNDS):
            moved = 0.0
            for first, second in pairs:
                groups = getattr(layers[second], "groups", 1)
                one = weights[first].flatten(1).abs().amax(1)
                two = input_channels(weights[second], groups).abs().amax((1, 3)).flatten()
                usable = (one > 0) & (two > 0)
                s = torch.where(usable, (one / two.clamp(min=1e-300)).sqrt(), 1.0)
                moved = max(moved, float((s - 1).abs().max()))
                weights[first] = weights[first] / _column(s, weights[first])
                if first in biases:
                    biases[first] = biases[first] / s
                scaled = input_channels(weights[second], groups) * s.reshape(groups, 1, -1, 1)
                weights[second] = scaled.reshape(weights[second].shape)
                total[second] = total[second] * s
            if moved < CONVERGED:
                break
        for name, layer in layers.items():
            layer.weight = nn.Parameter(weights[name].float(), requires_grad=False)
            if name in biases:
                layer.bias = nn.Parameter(biases[name].float(), requires_grad=False)
        return total


def _column(s: Tensor, weight: Tensor) -> Tensor:
    return s.reshape(-1, *[1] * (weight.dim() - 1))


def input_channels(weight: Tensor, groups: int) -> Tensor:
    """``[out, in / groups, *kernel]`` as ``[groups, out / groups, in / groups, kernel]``."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def find_pairs(model: nn.Module) -> tuple[list[tuple[str, str]], str]:
    """Layers that only a positively homogeneous function stands between, and that nothing else
    reads; and why there are none, where the model cannot be traced."""
    try:
        graph = fx.symbolic_trace(copy.deepcopy(model)).graph
    except Exception as error:  # fx raises many types on control flow it cannot follow
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [], f"cle: the model cannot be traced ({why})"
    modules = dict(model.named_modules())
    uses: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            uses[str(node.target)] = uses.get(str(node.target), 0) + 1
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[str(node.target)]) not in LAYERS:
            continue
        after = _only_reader(node)
        while after is not None and _homogeneous(after, modules):
            after = _only_reader(after)
        if after is None or after.op != "call_module":
            continue
        first, second = str(node.target), str(after.target)
        if type(modules[second]) in LAYERS and uses[first] == uses[second] == 1:
            pairs.append((first, second))
    fitting = [p for p in pairs if _channels_fit(modules[p[0]], modules[p[1]])]
    return fitting, "" if fitting else "cle: no two layers have a homogeneous function between them"


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _homogeneous(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], HOMOGENEOUS_MODULES)
    if node.op == "call_function":
        return node.target in HOMOGENEOUS_FUNCTIONS
    return node.op == "call_method" and node.target in HOMOGENEOUS_METHODS


def _channels_fit(first: nn.Module, second: nn.Module) -> bool:
    """A flatten between them would spread a channel over many inputs."""
    one, two = first.weight, second.weight
    assert isinstance(one, Tensor)
    assert isinstance(two, Tensor)
    groups = getattr(second, "groups", 1)
    return (
        one.shape[0] == two.shape[1] * groups
        and type(first).__name__[:4] == type(second).__name__[:4]
    )
