"""Training the small subjects that halfstep ships: seeded, cached by digest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfstep.digest import digest_code, digest_json
from halfstep.errors import UserError
from halfstep.examples import Examples
from halfstep.subject import Subject
from sources.context import Context, Pools

Loss = Callable[[Tensor, torch.Generator], Tensor]
"""The loss of some rows; what it draws comes from the generator."""


def train_pool(name: str, pools: Pools) -> Examples:
    """The pool that a subject trains on."""
    if "train" not in pools:
        raise UserError(f"{name} trains on the pool 'train'; the data has {sorted(pools)}")
    return pools["train"]


class Recipe(Protocol):
    """How a small subject is trained; frozen dataclasses."""

    @property
    def epochs(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def seed(self) -> int: ...

    @property
    def threads(self) -> int:
        """Torch threads while training. Part of the recipe: they can move the last bit."""
        ...


def trained(
    name: str,
    recipe: Recipe,
    make: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module], Loss],
    data: Examples,
    context: Context,
) -> Subject:
    """The model with its weights: from the cache where the same recipe, data and code made them
    before, else trained."""
    settings = asdict(recipe)  # type: ignore[call-overload]
    with deterministic(recipe.seed, recipe.threads):
        model = make()
    key = digest_json(
        {
            "recipe": settings,
            "data": data.digest,
            "code": digest_code([Path(__file__).parent]),
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }
    )
    origin: dict[str, object] = {"source": name, "recipe": settings, "key": key}
    path = context.cache / "subjects" / f"{key}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return Subject(model, origin, reused=True)
    with deterministic(recipe.seed, recipe.threads):
        model.train()
        _descend(model, len(data), loss_of(model), recipe)
        model.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(model.state_dict(), partial)
    partial.replace(path)
    return Subject(model, origin)


def _descend(model: nn.Module, rows: int, loss: Loss, recipe: Recipe) -> None:
    """AdamW under one cycle of learning rates."""
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = -(-rows // recipe.batch_size) * recipe.epochs
    rate = recipe.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(recipe.epochs):
        for index in torch.randperm(rows, generator=generator).split(recipe.batch_size):
            optimizer.zero_grad()
            loss(index, generator).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


@contextmanager
def deterministic(seed: int, threads: int) -> Iterator[None]:
    """Seeds torch, fixes its threads, insists on deterministic operators; then puts all back."""
    before, threads_before = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # The same switch as `use_deterministic_algorithms`, which imports inductor for seconds.
        torch.set_deterministic_debug_mode("error")
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
            torch.set_num_threads(threads_before)
