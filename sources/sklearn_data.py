"""The data sets that scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass

from halfstep.errors import UserError, allowed
from sources.arrays import Pools, carve, image_examples

NAMES = ("digits",)


@dataclass(frozen=True)
class Sklearn:
    """``digits``: 1,797 handwritten digits of 8 × 8 pixels (UCI optdigits test set).

    The set has no official split: ``validation`` and ``test`` are carved out of it, stratified
    by class; the rest is ``train``.
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

    def load(self) -> Pools:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        examples = image_examples(bunch.images, bunch.target, brightest=16.0)
        sizes = {"validation": self.validation, "test": self.test}
        return carve(examples, sizes, rest="train", seed=self.seed)
