"""Pools made from arrays: shared helpers, and the ``factory`` data source."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from halfstep.errors import UserError, allowed
from halfstep.subject import Examples

Pools = Mapping[str, Examples]


def image_examples(pixels: np.ndarray, labels: np.ndarray, brightest: float) -> Examples:
    """Grey or colour images ``[n, h, w(, c)]`` scaled to 0..1, as ``[n, c, h, w]`` float32."""
    images = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(brightest)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Examples(images, torch.from_numpy(np.asarray(labels).astype(np.int64)))


def carve(
    examples: Examples, sizes: Mapping[str, int], rest: str, seed: int
) -> dict[str, Examples]:
    """Deals examples into named pools of the given sizes, the remainder into ``rest``.

    Stratified by target: every pool keeps the class shares to within one example a class.
    """
    wanted = sum(sizes.values())
    if wanted >= len(examples):
        raise UserError(
            f"pools {dict(sizes)} ask for {wanted} of {len(examples)} examples and leave none for "
            f"{rest!r}"
        )
    shuffled = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    targets = examples.targets[shuffled]
    # Rank of each example inside its class, as a fraction: sorting by it interleaves the classes.
    fraction = torch.empty(len(examples), dtype=torch.float64)
    for value in targets.unique():
        members = (targets == value).nonzero().flatten()
        fraction[members] = (torch.arange(len(members)).double() + 0.5) / len(members)
    order = shuffled[torch.argsort(fraction, stable=True)]
    pools, start = {}, 0
    for name, size in sizes.items():
        pools[name] = examples.take(order[start : start + size].sort().values)
        start += size
    pools[rest] = examples.take(order[start:].sort().values)
    return pools


def resolve(target: str) -> Callable[..., object]:
    """Imports ``module:function``; modules of the current folder are importable too."""
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UserError(f"target {target!r} is not of the form module:function")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"target {target!r}: cannot import {module_name!r} ({error})") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UserError(f"target {target!r}: no such function; {allowed(attribute, public)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise UserError(f"target {target!r} is not a function")
    return function  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Factory:
    """Data from a Python function ``module:function`` that returns pools of (inputs, targets)."""

    target: str
    arguments: dict[str, object] = field(default_factory=dict)

    def load(self) -> Pools:
        made = resolve(self.target)(**self.arguments)
        if not isinstance(made, Mapping):
            raise UserError(
                f"data factory {self.target!r} returned {type(made).__name__}; it must return a "
                "mapping of pool name to (inputs, targets)"
            )
        return {
            name: Examples(torch.as_tensor(inputs).float(), torch.as_tensor(targets).long())
            for name, (inputs, targets) in made.items()
        }
