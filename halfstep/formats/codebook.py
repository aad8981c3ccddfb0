"""Codebooks: any table of values, such as NF4's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfstep.formats.sizes import SCALE_BITS


@dataclass(frozen=True)
class Codebook:
    """A table of values; ``x ~ scale * table[code]``. The table's largest magnitude is 1."""

    name: str
    bits: int
    table: tuple[float, ...]
    """Ascending, each value exact in float32."""

    symmetric: ClassVar[bool] = True
    scaled: ClassVar[bool] = True
    block: ClassVar[int | None] = None
    tensor_scaled: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    block_bits: ClassVar[int] = SCALE_BITS
    storage: ClassVar[torch.dtype] = torch.uint8

    def qparams(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale ``amax`` (float64), zero point 0."""
        return torch.maximum(lo.abs(), hi.abs()), torch.zeros_like(lo, dtype=torch.int32)

    def limits(self, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the grid, as float32 of the zero point's shape."""
        ends = torch.zeros_like(zero_point, dtype=torch.float32)
        return ends + self.table[0], ends + self.table[-1]

    def round_(self, u: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
        """Moves ``u`` (float32) in place to the nearest entry; a tie goes to the lower one."""
        return u.copy_(self.grid().float()[self.encode(u, torch.zeros(())).long()])

    def encode(self, u: Tensor, zero_point: Tensor) -> Tensor:
        """The index of the nearest entry (bitsandbytes' thresholds: a tie goes down)."""
        table = self.grid()
        borders = ((table[1:] + table[:-1]) / 2).float()
        return torch.bucketize(u.contiguous(), borders).to(torch.uint8)

    def decode(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """The entries (float32) of codes."""
        return self.grid().float()[codes.long()]

    def gap(self, u: Tensor) -> Tensor:
        """Distance between the entries around ``u``."""
        table = self.grid().float()
        above = torch.bucketize(u.contiguous(), table, right=True).clamp(1, len(table) - 1)
        return table[above] - table[above - 1]

    def grid(self) -> Tensor:
        """The table, float64."""
        return torch.tensor(self.table, dtype=torch.float64)

    def positive_edges(self, *, unsigned: bool) -> Tensor:
        """Borders of the levels of ``|x|`` as fractions of the range, for entropy."""
        levels: Tensor = self.grid().abs().unique()  # type: ignore[no-untyped-call]
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])


BINARY = Codebook("int1", 1, (-1.0, 1.0))
"""One bit: a sign, and no zero (XNOR-Net, Rastegari et al. 2016)."""

NF4 = Codebook(
    "nf4",
    4,
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
"""Dettmers et al. 2023 (QLoRA), appendix E: quantiles of a Gaussian, an exact zero, ends at 1."""
