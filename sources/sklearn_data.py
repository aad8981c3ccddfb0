"""The data sets that scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from halfstep.errors import UserError, allowed
from halfstep.examples import Column, Examples, Inputs
from sources.arrays import carve, image_examples
from sources.context import Context, Pools

NAMES = ("digits", "diabetes", "breast_cancer", "wine")


@dataclass(frozen=True)
class Sklearn:
    """- ``digits``: 1,797 handwritten digits of 8 × 8 pixels (UCI optdigits test set)
    - ``diabetes``: 442 patients, ten measurements, disease progression after a year (a number)
    - ``breast_cancer``: 569 tumours, 30 measurements; the target is 1 for the malignant ones
    - ``wine``: 178 wines, 13 measurements, three cultivars

    None has an official split: ``validation`` and ``test`` are carved out, stratified by class; the
    rest is ``train``. Measurements are standardised by the training pool.
    """

    name: str
    validation: int = 500
    test: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(
                f"unknown scikit-learn data set {self.name!r}; {allowed(self.name, NAMES)}"
            )

    def load(self, context: Context) -> Pools:
        from sklearn import datasets

        bunch = getattr(datasets, f"load_{self.name}")()
        sizes = {"validation": self.validation, "test": self.test}
        if self.name == "digits":
            examples = image_examples(bunch.images, bunch.target, brightest=16.0)
            return carve(examples, sizes, rest="train", seed=self.seed)
        targets = bunch.target.astype(np.float32 if self.name == "diabetes" else np.int64)
        if self.name == "breast_cancer":
            targets = 1 - targets  # scikit-learn counts the benign ones as 1
        raw = Examples(Inputs.of(torch.from_numpy(bunch.data)), Column.of(targets))
        return standardised(carve(raw, sizes, rest="train", seed=self.seed))


def standardised(pools: Pools) -> Pools:
    """Float32 inputs, less the training pool's mean and over its standard deviation."""
    train: Any = pools["train"].inputs.tensor.double()
    mean, deviation = train.mean(0), train.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return {
        name: Examples(
            Inputs.of(((e.inputs.tensor.double() - mean) / deviation).float()), e.targets
        )
        for name, e in pools.items()
    }
