"""Granularities: which values share one scale.

Weights are seen as a matrix ``[out, reduction]`` (`halfstep.layout`). Each granularity
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
class PerBlock:
    """One scale for each tile of ``rows`` by ``columns`` of the matrix; (8, 32) with 4x16 has 4.

    Where the tile does not divide the matrix, the last tiles of an axis are smaller.
    """

    rows: int
    columns: int
    dynamic: ClassVar[bool] = False

    def block_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        return (min(self.rows, shape[0]), min(self.columns, shape[1]))

    def __str__(self) -> str:
        return f"per_block({self.rows}x{self.columns})"


@dataclass(frozen=True)
class PerToken:
    """Activations only, dynamic: each token's range is taken from the token itself.

    A token is what one accumulator runs over: the last axis of a linear's input, one whole example
    ``[C, *spatial]`` of a convolution's.
    """

    dynamic: ClassVar[bool] = True

    def __str__(self) -> str:
        return "per_token"


@dataclass(frozen=True)
class PerPosition:
    """Activations only, static: each token position has a scale of its own, fixed at calibration.

    Positions beyond those that calibration saw take the widest of all. Inputs without an axis of
    tokens have one position, and so one scale.
    """

    dynamic: ClassVar[bool] = False

    def __str__(self) -> str:
        return "per_token_static"


@dataclass(frozen=True)
class PerTokenBlock:
    """Activations only, dynamic: one scale for ``size`` consecutive values of a token.

    A token never shares a scale with another one, so what stands beside it in a batch cannot
    change it. The last block of a token may be shorter.
    """

    size: int
    dynamic: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"per_block(1x{self.size})"


WeightGranularity = PerTensor | PerAxis | PerGroup | PerBlock
ActivationGranularity = PerTensor | PerToken | PerPosition | PerTokenBlock
Granularity = WeightGranularity | ActivationGranularity

GRANULARITIES: dict[str, type[Granularity]] = {
    "per_tensor": PerTensor,
    "per_channel": PerAxis,
    "per_group": PerGroup,
    "per_block": PerBlock,
    "per_token": PerToken,
    "per_token_static": PerPosition,
}
FOR_WEIGHTS = ("per_tensor", "per_channel", "per_group", "per_block")
FOR_ACTIVATIONS = ("per_tensor", "per_token", "per_token_static", "per_block")


def parse_granularity(text: str, side: str) -> Granularity:
    """Reads ``per_channel``, ``per_group(32)``, ``per_block(128x128)``; ``side`` is ``weights`` or
    ``activations``.

    ``per_block(128)`` is a tile of 128x128 weights, or 128 consecutive values of one token.

    Raises:
        UserError: no such granularity, or not for this side.
    """
    match = re.fullmatch(r"(\w+)(?:\((\d+)(?:x(\d+))?\))?", text.strip())
    name, first, second = (match[1], match[2], match[3]) if match else (text, None, None)
    fitting = FOR_WEIGHTS if side == "weights" else FOR_ACTIVATIONS
    if name not in fitting:
        raise UserError(f"unknown granularity for {side} {text!r}; {allowed(name, fitting)}")
    sized = name in ("per_group", "per_block")
    if sized != (first is not None) or "0" in (first, second) or (second and name == "per_group"):
        raise UserError(
            f"granularity {text!r}: per_group takes a size of at least 1, as in per_group(32), "
            "per_block one or two, as in per_block(128) or per_block(1x32); the others take none"
        )
    if first is None:
        return GRANULARITIES[name]()  # type: ignore[call-arg]
    size = int(first)
    if name == "per_group":
        return PerGroup(size)
    rows, columns = (size, int(second)) if second else (size, size)
    if side == "weights":
        return PerBlock(rows, columns)
    if second and rows != 1:
        raise UserError(
            f"granularity {text!r}: a block of activations lies inside one token, as in "
            f"per_block(1x{columns}); over {rows} tokens the batch would change a result"
        )
    return PerTokenBlock(columns)


def grid_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has along each axis: the shape of its scale."""
    return (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))


def to_blocks(matrix: Tensor, block: tuple[int, int]) -> list[Tensor]:
    """The matrix's blocks as rows ``[blocks, values]``, one tensor for each size of block.

    Full blocks first, in row-major order of the scale's grid; then, where the block does not
    divide the matrix, the narrower last column, the lower last row, and their corner.
    """
    rows, columns = matrix.shape
    parts = []
    for top, height, bottom in _spans(rows, block[0]):
        for left, width, right in _spans(columns, block[1]):
            part = matrix[top:bottom, left:right]
            tiles = part.reshape((bottom - top) // height, height, (right - left) // width, width)
            parts.append(tiles.transpose(1, 2).reshape(-1, height * width))
    return parts


def from_blocks(parts: list[Tensor], shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Puts one value a block (as `to_blocks` ordered them) back on the scale's grid."""
    pieces = iter(parts)
    lines = []
    for top, height, bottom in _spans(shape[0], block[0]):
        line = [
            next(pieces).reshape((bottom - top) // height, (right - left) // width)
            for left, width, right in _spans(shape[1], block[1])
        ]
        lines.append(torch.cat(line, dim=1))
    return torch.cat(lines)


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """(start, block, end) of the part that whole blocks fill, and of the shorter rest."""
    whole = length // size * size
    spans = [(0, size, whole)] if whole else []
    return spans + ([(whole, length - whole, length)] if whole < length else [])


def expand(values: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Values on the scale's grid, made broadcastable against a matrix of ``shape``."""
    if values.shape[1] > 1:
        values = values.repeat_interleave(block[1], dim=1)[:, : shape[1]]
    if 1 < values.shape[0] < shape[0]:
        values = values.repeat_interleave(block[0], dim=0)[: shape[0]]
    return values
