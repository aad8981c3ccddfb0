"""Subjects and examples: what is evaluated, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from halfstep.digest import digest_json, digest_rows, digest_tensors
from halfstep.errors import UserError


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with their targets; row i of one belongs to row i of the other."""

    inputs: Tensor
    """float32, ``[n, ...]``: one example a row, as the model takes them."""
    targets: Tensor
    """What the evaluator compares with; int64 class numbers for classification."""

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise UserError(f"{len(self.inputs)} inputs but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Tensor) -> Examples:
        return Examples(self.inputs[index], self.targets[index])

    @cached_property
    def row_digests(self) -> list[str]:
        """Content digest of each input: equal rows are the same example, wherever they stand."""
        return digest_rows(self.inputs.numpy())

    @cached_property
    def digest(self) -> str:
        """Over every byte of inputs and targets, in order."""
        return digest_tensors({"inputs": self.inputs, "targets": self.targets})


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under evaluation."""

    model: nn.Module
    """In evaluation mode, float32."""
    origin: dict[str, object]
    """Where it came from, as JSON."""
    reused: bool = False
    """True where nothing was trained because a cached copy had the same digest."""

    @cached_property
    def digest(self) -> str:
        """Over the weights and the architecture's text, not over any path."""
        return digest_json(
            {"weights": digest_tensors(self.model.state_dict()), "architecture": str(self.model)}
        )


def check_weights(model: nn.Module) -> None:
    """Raises UserError naming the first parameter or buffer that holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise UserError(
                    f"weight {name} of the subject holds {bad} NaN or infinite value(s) of "
                    f"{tensor.numel()}; halfstep quantizes finite weights only"
                )
