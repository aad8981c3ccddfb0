"""Granularities: which values share one scale.

Weights are seen as a matrix ``[out, reduction]`` (`halfstep.sites.as_matrix`). Each granularity
answers with the block of that matrix, ``block_size(shape)``, that shares one scale, so one
arithmetic serves all of them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.errors import UserError, allowed


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: shape (8, 32) has blocks of (8, 32), one scale."""

    dynamic: ClassVar[bool] = False

    def block_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        return shape

    def __str__(self) -> str:
        return "per_tensor"


@dataclass(frozen=True)
class PerAxis:
    """One scale a row of the matrix, that is an output channel: (8, 32) has 8 blocks of (1, 32)."""

    dynamic: ClassVar[bool] = False

    def block_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        return (1, shape[1])

    def __str__(self) -> str:
        return "per_channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` consecutive values of a row; (8, 32) with 16 has 16 blocks.

    Where ``size`` does not divide the row, the last group of the row is shorter.
    """

    size: int
    dynamic: ClassVar[bool] = False

    def block_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        return (1, min(self.size, shape[1]))

    def __str__(self) -> str:
        return f"per_group({self.size})"


@dataclass(frozen=True)
class PerToken:
    """Activations only, dynamic: each token's range is taken from the token itself.

    A token is what shares its accumulator's scale in a linear or convolution: the last axis of a
    linear's input, and one whole example ``[C, *spatial]`` of a convolution's.
    """

    dynamic: ClassVar[bool] = True

    def __str__(self) -> str:
        return "per_token"


WeightGranularity = PerTensor | PerAxis | PerGroup
Granularity = WeightGranularity | PerToken

GRANULARITIES: dict[str, type[PerTensor] | type[PerAxis] | type[PerGroup] | type[PerToken]] = {
    "per_tensor": PerTensor,
    "per_channel": PerAxis,
    "per_group": PerGroup,
    "per_token": PerToken,
}
FOR_WEIGHTS = ("per_tensor", "per_channel", "per_group")
FOR_ACTIVATIONS = ("per_tensor", "per_token")


def parse_granularity(text: str) -> Granularity:
    """Reads ``per_channel``, ``per_group(32)`` and so on; raises UserError on anything else."""
    match = re.fullmatch(r"(\w+)(?:\((\d+)\))?", text.strip())
    name, size = (match[1], match[2]) if match else (text, None)
    if name not in GRANULARITIES:
        raise UserError(f"unknown granularity {text!r}; {allowed(name, GRANULARITIES)}")
    if (name == "per_group") != (size is not None) or size == "0":
        raise UserError(
            f"granularity {text!r}: per_group takes a size of at least 1, as in per_group(32); "
            "the others take none"
        )
    return PerGroup(int(size)) if size is not None else GRANULARITIES[name]()  # type: ignore[call-arg]


def grid_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has along each axis: the shape of its scale."""
    return (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))


def to_blocks(matrix: Tensor, block: tuple[int, int]) -> list[Tensor]:
    """The matrix's blocks as rows ``[blocks, values]``: the full ones, then the short tails.

    The full blocks come in row-major order of the scale's grid without its ragged last column;
    the tails, if any, are that column.
    """
    columns = matrix.shape[1]
    if block[0] != 1:  # one block for the whole tensor
        return [matrix.reshape(1, -1)]
    whole = columns // block[1] * block[1]
    parts = [matrix[:, :whole].reshape(-1, block[1])]
    if whole < columns:
        parts.append(matrix[:, whole:])
    return parts


def from_blocks(parts: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Puts one value a block (as `to_blocks` ordered them) back on the scale's grid."""
    if len(parts) == 1:
        return parts[0].reshape(grid)
    rows = grid[0]
    return torch.cat([parts[0].reshape(rows, -1), parts[1].reshape(rows, 1)], dim=1)


def expand(values: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Values on the scale's grid, made broadcastable against a matrix of ``shape``."""
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(block[1], dim=1)[:, : shape[1]]
