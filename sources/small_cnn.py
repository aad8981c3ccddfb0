"""A small residual CNN, trained on the data's own training pool: seeded, cached by digest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.digest import digest_code, digest_json
from halfstep.errors import UserError
from halfstep.subject import Examples, Subject
from sources.arrays import Pools


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

    def structure(self, pools: Pools) -> nn.Module:
        """The model before training: enough to see sites and sizes."""
        if "train" not in pools:
            raise UserError(f"small_cnn trains on the pool 'train'; the data has {sorted(pools)}")
        train = pools["train"]
        if train.inputs.dim() != 4:
            raise UserError(
                f"small_cnn takes images [n, channels, height, width]; the data is "
                f"{list(train.inputs.shape)}"
            )
        classes = int(train.targets.max()) + 1
        return Network(train.inputs.shape[1], self.width, self.blocks, classes).eval()

    def load(self, pools: Pools, cache: Path) -> Subject:
        """The trained model, from the cache where it was trained before."""
        with deterministic(self.seed, self.threads):
            model = self.structure(pools)
        train = pools["train"]
        key = digest_json(
            {
                "recipe": asdict(self),
                "data": train.digest,
                "code": digest_code([Path(__file__).parent]),
                "torch": torch.__version__,
                "cpu": torch.backends.cpu.get_cpu_capability(),
            }
        )
        origin: dict[str, object] = {"source": "small_cnn", "recipe": asdict(self), "key": key}
        path = cache / f"{key}.safetensors"
        if path.is_file():
            model.load_state_dict(load_file(path))
            return Subject(model, origin, reused=True)
        with deterministic(self.seed, self.threads):
            self._train(model, train)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file(model.state_dict(), partial)
        partial.replace(path)
        return Subject(model, origin)

    def _train(self, model: nn.Module, train: Examples) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        steps = -(-len(train) // self.batch_size) * self.epochs
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=steps
        )
        model.train()
        for _ in range(self.epochs):
            order = torch.randperm(len(train), generator=generator)
            for index in order.split(self.batch_size):
                images = _shifted(train.inputs[index], self.shift, generator)
                loss = F.cross_entropy(model(images), train.targets[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        model.eval()


def _shifted(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Moves a batch by one random offset, filling with zeros."""
    if reach == 0:
        return images
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return F.pad(images, (reach + dx, reach - dx, reach + dy, reach - dy))[
        ..., reach:-reach, reach:-reach
    ]


@contextmanager
def deterministic(seed: int, threads: int) -> Iterator[None]:
    """Seeds torch, fixes its threads, insists on deterministic operators; then puts all back."""
    before, threads_before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.set_num_threads(threads_before)
