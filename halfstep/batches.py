"""Batches: what a model is called with, and the one tensor that its answer comes down to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Tensor]
"""One tensor, passed by position; or several, each passed by the name of its argument."""


def forward(model: nn.Module, batch: Batch) -> Any:
    """What the model returns."""
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


def answer(returned: Any) -> Tensor:
    """The main tensor of what a model returned: itself, its logits, or the first of several.

    Raises:
        TypeError: there is no tensor in it.
    """
    if isinstance(returned, Tensor):
        return returned
    for name in ("logits", "last_hidden_state"):
        found = getattr(returned, name, None)
        if isinstance(found, Tensor):
            return found
    values = returned.values() if isinstance(returned, Mapping) else returned
    if isinstance(values, tuple | list) or isinstance(returned, Mapping):
        first = next((value for value in values if isinstance(value, Tensor)), None)
        if first is not None:
            return first
    raise TypeError(f"the model returned {type(returned).__name__}, which holds no tensor")


def each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    return {name: change(tensor) for name, tensor in batch.items()}


def first(batch: Batch, count: int) -> Batch:
    """The first examples of a batch."""
    return each(batch, lambda x: x[:count])


def twice(batch: Batch) -> Batch:
    """Every example of a batch, and again."""
    return each(batch, lambda x: torch.cat([x, x]))


def in_float64(batch: Batch) -> Batch:
    return each(batch, lambda x: x.double() if x.is_floating_point() else x)


def size(batch: Batch) -> int:
    """How many examples it holds."""
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
