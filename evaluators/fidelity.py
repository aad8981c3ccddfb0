"""Fidelity: how close to the full-precision subject, for when there are no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from evaluators import paired
from evaluators.evaluator import Evaluator, Progress, named, run_rows, scored, silent, table
from evaluators.metric import Metric, Outcomes
from evaluators.statistics import mean
from halfstep.batches import answer
from halfstep.examples import Examples


@dataclass(frozen=True)
class Fidelity(Evaluator):
    """Compares each example's whole answer with the reference's; targets are not looked at.

    ``cosine`` and ``relative_error`` (the norm of the difference over that of the reference's
    answer), averaged over examples; ``within``, the share of examples whose relative error is at
    most ``tolerance``; ``agreement``, the share whose largest output stays the same: what a
    classifier's users would see.
    """

    tolerance: float = 0.05

    headline: ClassVar[str] = "cosine"
    closeness: ClassVar[str] = "relative_error"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        def within(cell: Outcomes, reference: Outcomes) -> np.ndarray:
            return 1.0 * (_relative_error(cell, reference) <= self.tolerance)

        return named(
            Metric("cosine", True, lambda c, r: mean(_cosine(c, r)), paired.bootstrap),
            Metric("relative_error", False, lambda c, r: mean(_relative_error(c, r)),
                   paired.bootstrap, share=False),
            Metric("within", True, lambda c, r: mean(within(c, r)), paired.binary),
            Metric("agreement", True, lambda c, r: mean(_agreement(c, r)), paired.binary),
        )  # fmt: skip

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        def read(returned: Any, batch: Any, which: Any) -> dict[str, np.ndarray]:
            found = answer(returned).float().numpy()
            usable = scored(found)
            return {"answer": found.reshape(len(found), -1), "usable": usable}

        found = run_rows(model, examples.inputs, batch_size, read, progress)
        usable = found.pop("usable").astype(bool)
        return table(found, usable)


def _both(cell: Outcomes, reference: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """Answers as float64; what lies beyond an example's own length is zero in both."""
    theirs = reference["answer"].astype(np.float64)
    ours = np.where(np.isnan(theirs), 0.0, cell["answer"].astype(np.float64))
    return ours, np.nan_to_num(theirs)


def _cosine(cell: Outcomes, reference: Outcomes) -> np.ndarray:
    ours, theirs = _both(cell, reference)
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return (ours * theirs).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)  # type: ignore[no-any-return]


def _relative_error(cell: Outcomes, reference: Outcomes) -> np.ndarray:
    ours, theirs = _both(cell, reference)
    length = np.linalg.norm(theirs, axis=1)
    return np.linalg.norm(ours - theirs, axis=1) / np.where(length > 0, length, 1.0)  # type: ignore[no-any-return]


def _agreement(cell: Outcomes, reference: Outcomes) -> np.ndarray:
    ours, theirs = _both(cell, reference)
    hidden = np.isnan(reference["answer"])
    ours, theirs = np.where(hidden, -np.inf, ours), np.where(hidden, -np.inf, theirs)
    same = np.where(np.isnan(ours), -np.inf, ours).argmax(axis=1) == theirs.argmax(axis=1)
    return 1.0 * (same & cell["scored"])
