"""Determinism: which operators of a model may give other bits the next time."""

from __future__ import annotations

import re
import warnings

import torch
from torch import nn

from halfstep.batches import Batch, forward


def nondeterministic_operators(model: nn.Module, batch: Batch) -> tuple[str, ...]:
    """Names of operators that torch knows no deterministic implementation of on this device.

    Torch's own list: one batch is run with ``torch.use_deterministic_algorithms`` set to warn.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            forward(model, batch)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
    said = [str(w.message) for w in caught if "deterministic" in str(w.message)]
    return tuple(sorted({re.split(r" does not have", text)[0].strip() for text in said}))
