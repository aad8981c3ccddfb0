"""Determinism: which operators of a model may give other bits the next time."""

from __future__ import annotations

import re
import warnings

import torch
from torch import nn

from halfstep.batches import Batch, forward


def nondeterministic_operators(model: nn.Module, batch: Batch) -> tuple[str, ...]:
    """Names of operators that torch knows no deterministic implementation of on this device.

    Torch's own list: one batch is run with its deterministic mode set to warn.
    """
    before = torch.get_deterministic_debug_mode()
    # The same switch as `use_deterministic_algorithms`, which imports inductor for seconds.
    torch.set_deterministic_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            forward(model, batch)
    finally:
        torch.set_deterministic_debug_mode(before)
    said = [str(w.message) for w in caught if "deterministic" in str(w.message)]
    return tuple(sorted({re.split(r" does not have", text)[0].strip() for text in said}))
