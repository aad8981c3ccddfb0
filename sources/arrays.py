"""Examples from arrays, and dealing one set of them into pools."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from halfstep.errors import UserError
from halfstep.examples import Column, Examples, Inputs


def image_examples(pixels: np.ndarray, labels: np.ndarray, brightest: float) -> Examples:
    """Grey or colour images ``[n, h, w(, c)]`` scaled to 0..1, as ``[n, c, h, w]`` float32."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(brightest)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Examples(Inputs.of(images), Column.of(np.asarray(labels).astype(np.int64)))


def carve(
    examples: Examples, sizes: Mapping[str, int], rest: str, seed: int
) -> dict[str, Examples]:
    """Deals examples into named pools of the given sizes, the remainder into ``rest``.

    Stratified where targets are class numbers: every pool keeps the class shares to within one
    example a class. Examples of one cluster or document are not kept together.
    """
    dealt = _dealt(examples, sizes, rest, seed)
    return {name: examples.take(rows) for name, rows in zip([*sizes, rest], dealt, strict=True)}


def _dealt(examples: Examples, sizes: Mapping[str, int], rest: str, seed: int) -> list[np.ndarray]:
    wanted = sum(sizes.values())
    if wanted >= len(examples):
        raise UserError(
            f"pools {dict(sizes)} ask for {wanted} of {len(examples)} examples and leave none for "
            f"{rest!r}"
        )
    shuffled = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    order = shuffled
    if examples.targets.shape == () and not examples.targets.dtype.is_floating_point:
        targets = examples.targets.all()[shuffled]
        # Rank of each example inside its class, as a fraction: sorting by it interleaves the
        # classes.
        fraction = torch.empty(len(examples), dtype=torch.float64)
        for value in targets.unique():
            members = (targets == value).nonzero().flatten()
            fraction[members] = (torch.arange(len(members)).double() + 0.5) / len(members)
        order = shuffled[torch.argsort(fraction, stable=True)]
    ends = np.cumsum(list(sizes.values()))
    return [np.sort(part) for part in np.split(order.numpy(), ends)]
