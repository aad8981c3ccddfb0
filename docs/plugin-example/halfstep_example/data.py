"""A data source: points of a sine with noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from halfstep.examples import Column, Examples, Inputs
from sources import Context, Pools


@dataclass(frozen=True)
class Sine:
    """Fields are what a config may say; ``load`` returns examples by pool."""

    points: int = 900
    noise: float = 0.05
    seed: int = 0

    def load(self, context: Context) -> Pools:
        generator = torch.Generator().manual_seed(self.seed)
        pools = {}
        for name in ("train", "validation", "test"):
            x = 6.3 * torch.rand(self.points, 1, generator=generator)
            noise = self.noise * torch.randn(self.points, generator=generator)
            half = np.where(x[:, 0].numpy() < 3.15, "first", "second")
            pools[name] = Examples(
                Inputs.of(x), Column.of(torch.sin(x[:, 0]) + noise), columns={"half": half}
            )
        return pools
