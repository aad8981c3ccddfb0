"""A model as tracers want it: tensors in fixed places, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from halfstep.batches import Batch, forward


def in_places(batch: Batch) -> tuple[tuple[str, ...] | None, tuple[Tensor, ...]]:
    """A batch's tensors in fixed places, and their names where it has any."""
    if isinstance(batch, Tensor):
        return None, (batch,)
    return tuple(batch), tuple(batch.values())


class Called(nn.Module):
    """A model that takes and gives tensors in fixed places."""

    def __init__(self, model: nn.Module, names: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model, self.names = model, names
        # Of the outermost module only: exporters put back the mode that they found there.
        self.training = model.training
        self.outputs: tuple[str, ...] | None = None
        """Names of what the model returned, where it was several; None for one tensor."""

    def forward(self, *inputs: Tensor) -> Any:
        given: Batch = inputs[0]
        if self.names is not None:
            given = dict(zip(self.names, inputs, strict=True))
        returned = forward(self.model, given)
        if isinstance(returned, Tensor):
            return returned
        if isinstance(returned, Mapping):
            tensors = {n: v for n, v in returned.items() if isinstance(v, Tensor)}
            self.outputs = tuple(tensors)
            return tuple(tensors.values())
        raise TypeError(f"it returns {type(returned).__name__}, not tensors by name")
