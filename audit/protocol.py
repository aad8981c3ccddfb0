"""The protocol: everything that must be equal before two results may be compared."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch

from halfstep.digest import digest_code, digest_json

ROOT = Path(__file__).parent.parent


def protocol(
    task: str,
    evaluator: Mapping[str, object],
    splits: Mapping[str, tuple[str, int]],
    calibration: tuple[str, int],
    criteria: list[dict[str, object]],
    design: Mapping[str, object],
    compute: Mapping[str, object],
) -> dict[str, object]:
    """One task's protocol as JSON.

    Args:
        evaluator: its name and options.
        splits: by name (content digest, number of examples).
        calibration: the same of the rows that calibrate, for all tasks of a sweep together.
        design: what examples cluster by, and how many may be unscored.
    """
    return {
        "task": task,
        "evaluator": dict(evaluator),
        "evaluator_code": digest_code([ROOT / "evaluators"]),
        "splits": {name: {"sha256": sha, "examples": n} for name, (sha, n) in splits.items()},
        "calibration": {"sha256": calibration[0], "rows": calibration[1]},
        "criteria": criteria,
        "design": dict(design),
        "correction": "holm over the cells of all tasks",
        "compute": dict(compute),
    }


def implementation(plugins: Sequence[str] = ()) -> dict[str, object]:
    """What else moves bits: our numeric code, the libraries under it, the machine's kind, and other
    packages whose plug-ins take part."""
    return {
        "code": digest_code(
            [ROOT / p for p in ("halfstep", "evaluators", "sources", "backends", "tasks")]
        ),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "plugins": list(plugins),
    }


def key(**parts: object) -> str:
    """Digest that names a piece of work by what it depends on."""
    return digest_json(parts)
