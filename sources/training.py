"""Training the small subjects that halfstep ships: seeded, cached by digest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfstep.digest import digest_code, digest_json
from halfstep.errors import UserError
from halfstep.examples import Examples
from halfstep.subject import Subject
from sources.context import Context, Pools

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def train_pool(name: str, pools: Pools) -> Examples:
    """The pool that a subject trains on."""
    if "train" not in pools:
        raise UserError(f"{name} trains on the pool 'train'; the data has {sorted(pools)}")
    return pools["train"]


def trained(
    name: str,
    recipe: DataclassInstance,
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module], None],
    data: Examples,
    context: Context,
) -> Subject:
    """The model with its weights: from the cache where the same recipe, data and code made them
    before, else trained. ``recipe`` has ``seed`` and ``threads``."""
    settings: dict[str, Any] = asdict(recipe)
    with deterministic(settings["seed"], settings["threads"]):
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
    with deterministic(settings["seed"], settings["threads"]):
        model.train()
        train(model)
        model.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(model.state_dict(), partial)
    partial.replace(path)
    return Subject(model, origin)


def descend(
    model: nn.Module,
    rows: int,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """AdamW under one cycle of learning rates; ``loss`` is that of some rows, and draws what it
    needs from the generator."""
    generator = torch.Generator().manual_seed(seed)
    steps = -(-rows // batch_size) * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(rows, generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss(index, generator).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


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
