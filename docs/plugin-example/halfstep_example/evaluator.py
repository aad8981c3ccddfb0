"""An evaluator: the share of predictions that lie within a tolerance of the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from evaluators import paired
from evaluators.evaluator import Evaluator, Progress, named, reals, run_rows, scored, silent, table
from evaluators.metric import Metric, Outcomes
from evaluators.statistics import mean
from halfstep.batches import answer
from halfstep.examples import Examples


@dataclass(frozen=True)
class WithinTolerance(Evaluator):
    """The model returns one number an example. Fields are the options that a config may give."""

    tolerance: float = 0.1

    headline: ClassVar[str] = "within"
    closeness: ClassVar[str] = "drift"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        def within(cell: Outcomes) -> np.ndarray:
            return 1.0 * (np.abs(cell["said"] - cell["truth"]) <= self.tolerance)

        return named(
            # A hit or a miss an example: Tango's test for paired proportions.
            Metric("within", True, lambda cell, reference: mean(within(cell)), paired.binary),
            # A number an example: the paired bootstrap.
            Metric(
                "drift",
                False,
                lambda cell, reference: mean(np.abs(cell["said"] - reference["said"])),
                paired.bootstrap,
                share=False,
            ),
        )

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        found = run_rows(
            model,
            examples.inputs,
            batch_size,
            lambda returned, batch, which: {"said": answer(returned).double().numpy().reshape(-1)},
            progress,
        )
        return table({"truth": reals(examples), "said": found["said"]}, scored(found["said"]))
