"""Ranking and anomaly detection: do the examples that matter score above the others?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from evaluators import paired
from evaluators.embeddings import embed, pair_cosines
from evaluators.evaluator import Evaluator, Progress, integers, named, run_rows, silent, table
from evaluators.metric import Metric, Outcomes, Sums, Weighted
from evaluators.statistics import auroc, average_precision, mean
from halfstep.batches import answer
from halfstep.errors import UserError
from halfstep.examples import Examples


@dataclass(frozen=True)
class Ranking(Evaluator):
    """Targets are 1 for what is looked for (anomalies, duplicates, fraud) and 0 for the rest.

    The score is what the model returns: ``[batch]`` or ``[batch, 1]``; of ``[batch, 2]`` logits the
    second less the first; and where examples are pairs of rows, the cosine of their embeddings.

    AUROC and average precision as scikit-learn defines them, resampled stratified by target.
    ``recall_at_fpr`` and ``fpr_at_threshold`` take the threshold that lets ``false_positive_rate``
    of the negatives through *in the reference's scores*: a deployed threshold stays where it is
    when the model under it is quantized.
    """

    false_positive_rate: float = 0.05

    headline: ClassVar[str] = "auroc"
    closeness: ClassVar[str] = "drift"

    def __post_init__(self) -> None:
        if not 0 < self.false_positive_rate < 1:
            raise UserError(
                f"ranking: false_positive_rate {self.false_positive_rate:g} is not allowed: a "
                "number between 0 and 1"
            )

    @property
    def metrics(self) -> Mapping[str, Metric]:
        rate = self.false_positive_rate

        def over(cell: Outcomes, reference: Outcomes) -> np.ndarray:
            return _score(cell) > threshold(reference, rate)

        return named(
            Metric("auroc", True, _auroc, paired.Bootstrapped(span=1, order=2), strata=_positive),
            Metric("average_precision", True, _average_precision, paired.bootstrap,
                   strata=_positive),
            Metric("recall_at_fpr", True,
                   lambda c, r: _among(over(c, r), _positive(c)), paired.binary),
            Metric("fpr_at_threshold", False,
                   lambda c, r: _among(over(c, r), ~_positive(c)), paired.binary),
            Metric("flips", False, lambda c, r: mean(1.0 * (over(c, r) != over(r, r)))),
            Metric("drift", False, lambda c, r: mean(np.abs(c["score"] - r["score"])),
                   paired.bootstrap, share=False),
        )  # fmt: skip

    def check(self, pool: str, examples: Examples) -> None:
        super().check(pool, examples)
        label = integers(examples)
        if label.ndim != 1 or not np.isin(label, (0, 1)).all():
            raise UserError(f"{pool}: targets are 0 and 1; found {np.unique(label)[:5].tolist()}")
        if label.min() == label.max():
            raise UserError(
                f"{pool}: every target is {label.min()}; a ranking needs both kinds of examples"
            )

    def rehearsal(self, examples: Examples) -> Examples:
        label = integers(examples)
        return examples.take(np.unique([label.argmin(), label.argmax()]))

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        if examples.members is not None:
            rows = embed(model, examples, batch_size, progress)
            score = pair_cosines(rows, examples.members)
        else:
            score = run_rows(model, examples.inputs, batch_size, _read, progress)["score"]
        label = integers(examples).astype(bool)
        return table({"label": label, "score": score}, np.isfinite(score))


def _read(returned: Any, batch: Any, which: Any) -> dict[str, np.ndarray]:
    found = answer(returned).double().numpy()
    if found.ndim == 2 and found.shape[1] == 2:
        return {"score": found[:, 1] - found[:, 0]}
    if found.reshape(len(found), -1).shape[1] != 1:
        raise UserError(
            f"expected scores [batch] or [batch, 1], or two logits [batch, 2]; the model returned "
            f"{list(found.shape)}"
        )
    return {"score": found.reshape(-1)}


def threshold(reference: Outcomes, rate: float) -> float:
    """The score above which at most ``rate`` of the reference's negatives lie."""
    negatives = np.sort(reference["score"][~_positive(reference)])[::-1]
    return float(negatives[min(int(np.floor(rate * len(negatives))), len(negatives) - 1)])


def _positive(outcomes: Outcomes) -> np.ndarray:
    return outcomes["label"].astype(bool)


def _score(outcomes: Outcomes) -> np.ndarray:
    """What could not be scored ranks last."""
    return np.where(outcomes["scored"], outcomes["score"], -np.inf)


def _auroc(cell: Outcomes, _: Outcomes) -> Weighted:
    return auroc(_score(cell), _positive(cell))


def _average_precision(cell: Outcomes, _: Outcomes) -> Weighted:
    return average_precision(_score(cell), _positive(cell))


def _among(hit: np.ndarray, group: np.ndarray) -> Sums:
    return mean(np.where(group, hit.astype(np.float64), np.nan))
