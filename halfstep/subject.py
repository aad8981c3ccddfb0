"""Subjects: the model under evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from halfstep.digest import digest_json, digest_tensors
from halfstep.errors import UserError


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under evaluation."""

    model: nn.Module
    """In evaluation mode, float32."""
    origin: dict[str, object]
    """Where it came from, as JSON."""
    notes: tuple[str, ...] = ()
    """What a reader must know of it."""
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
