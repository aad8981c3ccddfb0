"""The protocol: everything that must be equal before two results may be compared."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import numpy
import torch

from halfstep.digest import digest_code, digest_json

ROOT = Path(__file__).parent.parent


def protocol(
    task: str,
    evaluator: str,
    splits: Mapping[str, tuple[str, int]],
    criteria: list[dict[str, object]],
    compute: Mapping[str, object],
) -> dict[str, object]:
    """The protocol as JSON. ``splits``: name to (content digest, number of examples)."""
    return {
        "task": task,
        "evaluator": evaluator,
        "evaluator_code": digest_code([ROOT / "evaluators"]),
        "splits": {name: {"sha256": sha, "examples": n} for name, (sha, n) in splits.items()},
        "criteria": criteria,
        "correction": "holm over cells",
        "compute": dict(compute),
    }


def implementation() -> dict[str, str]:
    """What else moves bits: our numeric code, the libraries under it, the machine's kind."""
    return {
        "code": digest_code([ROOT / p for p in ("halfstep", "evaluators", "sources", "tasks")]),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def key(**parts: object) -> str:
    """Digest that names a piece of work by what it depends on."""
    return digest_json(parts)
