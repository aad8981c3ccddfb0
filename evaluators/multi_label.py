"""Multi-label classification: any number of labels an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn
from torch.nn import functional as F

from evaluators import paired
from evaluators.evaluator import (
    Evaluator,
    Progress,
    integers,
    named,
    run_rows,
    scored,
    silent,
    table,
    tensor_of,
)
from evaluators.metric import Metric, Outcomes, Sums
from evaluators.statistics import f1, mean
from halfstep.errors import UserError
from halfstep.examples import Examples

WANTED = "logits [batch, labels]"


@dataclass(frozen=True)
class MultiLabel(Evaluator):
    """The model returns a logit a label, ``[batch, labels]``; targets are 0 or 1 for each.

    F1 averages, subset accuracy and Hamming loss as scikit-learn defines them. A label is given
    where its probability exceeds ``threshold``.
    """

    threshold: float = 0.5

    headline: ClassVar[str] = "micro_f1"
    closeness: ClassVar[str] = "flips"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def check(self, pool: str, examples: Examples) -> None:
        super().check(pool, examples)
        label = integers(examples)
        if label.ndim != 2 or not np.isin(label, (0, 1)).all():
            raise UserError(
                f"{pool}: a row of 0 and 1 an example is expected, one number a label; found "
                f"targets of shape {list(label.shape)} between {label.min()} and {label.max()}"
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
            lambda returned, batch, which: {"logit": tensor_of(returned, 2, WANTED).numpy()},
            progress,
        )
        logit, label = found["logit"].astype(np.float64), integers(examples)
        if logit.shape[1] != label.shape[1]:
            raise UserError(
                f"examples have {label.shape[1]} labels each, the model answers with "
                f"{logit.shape[1]}"
            )
        usable = scored(logit)
        given = (logit > np.log(self.threshold / (1 - self.threshold))) & usable[:, None]
        return table({"label": label.astype(bool), "given": given, "logit": found["logit"]}, usable)


def _counts(cell: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    label, given = cell["label"].astype(np.float64), cell["given"].astype(np.float64)
    return label * given, label + given


def _macro_f1(cell: Outcomes, _: Outcomes) -> Sums:
    return Sums(np.concatenate(_counts(cell), axis=1), lambda s: f1(*np.split(s, 2, axis=-1)))


def _micro_f1(cell: Outcomes, _: Outcomes) -> Sums:
    features = np.stack([part.sum(axis=1) for part in _counts(cell)], axis=1)
    return Sums(features, lambda s: f1(s[..., :1], s[..., 1:]))


def _log_loss(cell: Outcomes, _: Outcomes) -> Sums:
    import torch

    logit, label = (torch.from_numpy(cell[k]).double() for k in ("logit", "label"))
    loss = F.binary_cross_entropy_with_logits(logit, label, reduction="none")
    return mean(loss.mean(dim=1).numpy())


def _right(cell: Outcomes) -> np.ndarray:
    return (cell["label"] == cell["given"]) & cell["scored"][:, None]


METRICS = named(
    Metric("micro_f1", True, _micro_f1, paired.bootstrap),
    Metric("macro_f1", True, _macro_f1, paired.bootstrap),
    Metric("subset_accuracy", True, lambda c, r: mean(1.0 * _right(c).all(axis=1)), paired.binary),
    Metric("hamming_loss", False, lambda c, r: mean(1 - _right(c).mean(axis=1)), paired.bounded),
    Metric("log_loss", False, _log_loss, paired.bootstrap, share=False),
    Metric("flips", False, lambda c, r: mean((c["given"] != r["given"]).mean(axis=1))),
)
