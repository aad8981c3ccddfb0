"""Sentence similarity: does the cosine of two embeddings rank pairs as people do?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from evaluators import paired
from evaluators.embeddings import check_pairs, embed, pair_cosines
from evaluators.evaluator import Evaluator, Progress, named, reals, silent, table
from evaluators.metric import Metric, Outcomes, Weighted
from evaluators.statistics import mean, pearson, spearman
from halfstep.errors import UserError
from halfstep.examples import Examples


@dataclass(frozen=True)
class SentenceSimilarity(Evaluator):
    """Examples are pairs of rows; the model returns an embedding a row; targets are graded
    similarities on any scale.

    Spearman's rank correlation of cosine and target is what the STS benchmark reports (Cer et al.,
    "SemEval-2017 task 1", 2017); Pearson's beside it. ``drift`` is the mean distance of a pair's
    cosine to the reference's.
    """

    headline: ClassVar[str] = "spearman"
    closeness: ClassVar[str] = "drift"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def check(self, pool: str, examples: Examples) -> None:
        super().check(pool, examples)
        check_pairs(pool, examples)
        if len(np.unique(reals(examples))) < 2:
            raise UserError(f"{pool}: all targets are equal, so there is no order to keep")

    def rehearsal(self, examples: Examples) -> Examples:
        target = reals(examples)
        return examples.take(np.unique([target.argmin(), target.argmax()]))

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        assert examples.members is not None
        cosine = pair_cosines(embed(model, examples, batch_size, progress), examples.members)
        return table({"target": reals(examples), "cosine": cosine}, np.isfinite(cosine))


def _spearman(cell: Outcomes, _: Outcomes) -> Weighted:
    return spearman(np.where(cell["scored"], cell["cosine"], -1.0), cell["target"])


METRICS = named(
    Metric("spearman", True, _spearman, paired.Bootstrapped(span=6, order=3)),
    Metric("pearson", True,
           lambda c, r: pearson(np.where(c["scored"], c["cosine"], 0.0), c["target"]),
           paired.bootstrap),
    Metric("drift", False, lambda c, r: mean(np.abs(c["cosine"] - r["cosine"])), paired.bootstrap),
)  # fmt: skip
