"""A small multilayer perceptron for rows of numbers, trained on the data's own training pool."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.errors import UserError
from halfstep.examples import POSITIONAL
from halfstep.subject import Subject
from sources.context import Context, Pools
from sources.training import Loss, train_pool, trained


class Perceptron(nn.Module):
    """Hidden layers of equal width, and one output."""

    def __init__(self, inputs: int, width: int, depth: int, location: float, scale: float) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1)
        self.register_buffer("location", torch.tensor(location))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, inputs]`` to ``[batch]``, in the units of the targets."""
        return self.head(self.body(x))[:, 0] * self.scale + self.location


@dataclass(frozen=True)
class SmallMlp:
    """The recipe: one number an example. ``objective`` is what training lowers: ``regression`` the
    squared error of standardised targets, ``detection`` the logistic loss of targets 0 and 1."""

    objective: str = "regression"
    width: int = 64
    depth: int = 2
    epochs: int = 60
    batch_size: int = 32
    learning_rate: float = 0.01
    noise: float = 0.2
    """Standard deviation of what is added to inputs in training: the only regularisation beside
    weight decay."""
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.objective not in ("regression", "detection"):
            raise UserError(
                f"subject.objective: {self.objective!r} is not allowed: regression or detection"
            )

    def structure(self, pools: Pools, context: Context) -> nn.Module:
        """The model before training."""
        train = train_pool("small_mlp", pools)
        column = train.inputs.columns.get(POSITIONAL)
        if column is None or len(column.shape) != 1 or column.shape[0] is None:
            raise UserError(
                f"small_mlp takes rows of numbers, one tensor [n, columns]; the data is "
                f"{train.inputs.described()}"
            )
        target = train.targets.all().double()
        location, scale = 0.0, 1.0
        if self.objective == "regression":
            location, scale = float(target.mean()), float(target.std())
        return Perceptron(column.shape[0], self.width, self.depth, location, scale).eval()

    def load(self, pools: Pools, context: Context) -> Subject:
        """The trained model, from the cache where it was trained before."""
        train = train_pool("small_mlp", pools)
        inputs, targets = train.inputs.tensor, train.targets.all().float()

        def loss_of(model: nn.Module) -> Loss:
            assert isinstance(model.scale, Tensor)
            scale = model.scale

            def loss(index: Tensor, generator: torch.Generator) -> Tensor:
                x = inputs[index]
                said = model(x + self.noise * torch.randn(x.shape, generator=generator))
                if self.objective == "detection":
                    return F.binary_cross_entropy_with_logits(said, targets[index])
                return F.mse_loss(said / scale, targets[index] / scale)

            return loss

        return trained(
            "small_mlp", self, lambda: self.structure(pools, context), loss_of, train, context
        )
