"""Layouts: a weight of any operator as a matrix ``[out, reduction]``.

One row of the matrix is what one output's accumulator runs over, so "per channel" and "per group"
mean the same for every operator: a linear's rows, a convolution's kernels, the columns of a Hugging
Face ``Conv1D``, the output channels of a grouped transposed convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which axes of a weight count outputs; the others are summed over."""

    view: tuple[int, ...]
    """Shape that the weight is read as (grouped transposed convolutions have one axis more)."""
    rows: tuple[int, ...]
    """Axes of ``view`` that make up the rows, in order."""

    @property
    def _order(self) -> tuple[int, ...]:
        return self.rows + tuple(i for i in range(len(self.view)) if i not in self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        out = math.prod(self.view[i] for i in self.rows)
        return out, math.prod(self.view) // max(out, 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``[out, reduction]``."""
        return weight.reshape(self.view).permute(self._order).reshape(self.shape)

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrix`: back to the weight's own shape."""
        order = self._order
        back = [order.index(i) for i in range(len(order))]
        return matrix.reshape([self.view[i] for i in order]).permute(back).reshape(list(shape))


def rows_of(shape: Sequence[int], rows: Sequence[int]) -> Layout:
    """The layout of a weight of some shape whose axes ``rows`` count outputs."""
    return Layout(tuple(shape), tuple(axis % len(shape) for axis in rows))


def transposed_convolution(shape: Sequence[int], groups: int) -> Layout:
    """``[in, out / groups, *kernel]``: each group reads its own part of ``in``."""
    return Layout((groups, shape[0] // groups, *shape[1:]), (0, 2))
