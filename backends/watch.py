"""Which of torch's operators ran, and for how long."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from backends.backend import NodeRun
from halfstep.batches import Batch, forward

PRODUCTS = {
    "_int_mm": "int8", "qconv_pointwise": "int8", "qlinear_pointwise": "int8",
    "_convolution_pointwise": "fp32", "_linear_pointwise": "fp32", "_mkl_linear": "fp32",
    "convolution": "fp32", "mm": "fp32", "addmm": "fp32", "bmm": "fp32", "baddbmm": "fp32",
}  # fmt: skip
"""The operators that multiply and accumulate, by the arithmetic that they do it in."""


def operators(model: nn.Module, batch: Batch) -> list[NodeRun]:
    """Every operator that runs while a model answers a batch."""
    watch = _Watch()
    with torch.no_grad(), watch:
        forward(model, batch)
    return watch.seen


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[NodeRun] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        started = time.perf_counter()
        made = func(*args, **(kwargs or {}))
        taken = (time.perf_counter() - started) * 1e6
        kind = func.overloadpacket.__name__
        name = f"{kind}#{sum(node.kind == kind for node in self.seen) + 1}"
        self.seen.append(NodeRun(name, kind, PRODUCTS.get(kind, "other"), taken))
        return made
