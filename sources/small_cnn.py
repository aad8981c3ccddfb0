"""A small residual CNN, trained on the data's own training pool: seeded, cached by digest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.errors import UserError
from halfstep.examples import POSITIONAL
from halfstep.subject import Subject
from sources.context import Context, Pools
from sources.training import Loss, train_pool, trained


class Residual(nn.Module):
    """Two 3×3 convolutions beside a 1×1 one, halving height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.bn3(self.shortcut(x)))


class Network(nn.Module):
    """Stem, residual blocks of doubling width, mean over positions, linear head."""

    def __init__(self, channels: int, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            *[Residual(width * 2**i, width * 2 ** (i + 1)) for i in range(blocks)]
        )
        self.head = nn.Linear(width * 2**blocks, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class SmallCnn:
    """The recipe. Any change to it, to the data or to this code trains anew."""

    width: int = 16
    blocks: int = 2
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.01
    shift: int = 1
    """Training images are moved by up to this many pixels: a small set's only augmentation."""
    seed: int = 0
    threads: int = 1
    """Torch threads while training. Part of the recipe: it can move the last bit."""

    def structure(self, pools: Pools, context: Context) -> nn.Module:
        """The model before training: enough to see sites and sizes."""
        train = train_pool("small_cnn", pools)
        column = train.inputs.columns.get(POSITIONAL)
        if column is None or len(column.shape) != 3:
            raise UserError(
                "small_cnn takes images, one tensor [n, channels, height, width]; the data is "
                f"{train.inputs.described()}"
            )
        classes = int(train.targets.all().max()) + 1
        return Network(column.rows(slice(0, 1)).shape[1], self.width, self.blocks, classes).eval()

    def load(self, pools: Pools, context: Context) -> Subject:
        """The trained model, from the cache where it was trained before."""
        train = train_pool("small_cnn", pools)
        images, labels = train.inputs.tensor, train.targets.all()

        def loss_of(model: nn.Module) -> Loss:
            def loss(index: Tensor, generator: torch.Generator) -> Tensor:
                moved = _shifted(images[index], self.shift, generator)
                return F.cross_entropy(model(moved), labels[index], label_smoothing=0.05)

            return loss

        return trained(
            "small_cnn", self, lambda: self.structure(pools, context), loss_of, train, context
        )


def _shifted(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Moves a batch by one random offset, filling with zeros."""
    if reach == 0:
        return images
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return F.pad(images, (reach + dx, reach - dx, reach + dy, reach - dy))[
        ..., reach:-reach, reach:-reach
    ]
