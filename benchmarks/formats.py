"""SQNR and size of every format on a Gaussian weight: the table of docs/numerics.md.

python -m benchmarks.formats
"""

from __future__ import annotations

import math

import torch

from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerGroup
from halfstep.scheme import Spec
from halfstep.weights import packed_bits, quantize_weight

SHAPE = (512, 4096)


def main() -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    print("| format | per channel, minmax | per channel, mse | groups of 64, mse | bits a weight |")
    print("| --- | --- | --- | --- | --- |")
    for fmt in FORMATS.values():
        channel, best = (Spec(fmt, PerAxis(), c) for c in ("minmax", "mse"))
        group = Spec(fmt, PerGroup(64), "mse")
        alone = not fmt.scaled or fmt.block is not None
        cells = [_decibels(weight, channel)]
        cells += ["–", "–"] if alone else [_decibels(weight, best), _decibels(weight, group)]
        bits = packed_bits(SHAPE, channel) / math.prod(SHAPE)
        more = "" if alone else f" ({packed_bits(SHAPE, group) / math.prod(SHAPE):.3f} in groups)"
        print(f"| `{fmt.name}` | {' | '.join(cells)} | {bits:.3f}{more} |")


def _decibels(weight: torch.Tensor, spec: Spec) -> str:
    error = (quantize_weight(weight, spec).values - weight).double().square().sum()
    return f"{10 * math.log10(weight.double().square().sum() / error):.2f}"


if __name__ == "__main__":
    main()
