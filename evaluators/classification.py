"""Classification of images, texts or anything else: one label an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

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
from evaluators.statistics import f1, mean, one_hot, smallest_share
from halfstep.errors import UserError
from halfstep.examples import Examples

ECE_BINS = 15
WANTED = "logits [batch, classes]"


@dataclass(frozen=True)
class Classification(Evaluator):
    """The model returns logits ``[batch, classes]``; targets are class numbers from 0.

    Accuracy, macro-F1, MCC, log-loss, Brier and recall as scikit-learn defines them; ECE: Naeini et
    al. 2015; Jensen-Shannon divergence: Lin 1991. An example that could not be scored counts as
    wrong, and is left out of what needs probabilities.
    """

    headline: ClassVar[str] = "accuracy"
    closeness: ClassVar[str] = "kl_mean"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def rehearsal(self, examples: Examples) -> Examples:
        labels = integers(examples)
        return examples.take(np.unique([0, labels.argmin(), labels.argmax()]))

    def check(self, pool: str, examples: Examples) -> None:
        super().check(pool, examples)
        if len(examples.targets.shape) != 0:
            raise UserError(
                f"{pool}: one class number an example is expected; the targets are "
                f"[n, {', '.join(map(str, examples.targets.shape))}]"
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
            lambda returned, batch, which: {
                "log_p": torch.log_softmax(tensor_of(returned, 2, WANTED).double(), dim=1).numpy()
            },
            progress,
        )
        log_p, label = found["log_p"], integers(examples)
        if label.min() < 0 or label.max() >= log_p.shape[1]:
            worst = int(np.argmax((label < 0) | (label >= log_p.shape[1])))
            raise UserError(
                f"labels run from {label.min()} to {label.max()} but the model answers with "
                f"{log_p.shape[1]} classes, 0 to {log_p.shape[1] - 1} (the first wrong label is "
                f"{label[worst]}, at example {worst})"
            )
        return outcomes(label, log_p)


def outcomes(label: np.ndarray, log_p: np.ndarray) -> Outcomes:
    """From labels and log-probabilities ``[n, classes]``; rows with NaN could not be scored."""
    usable = scored(log_p)
    best = np.where(usable[:, None], log_p, 0.0).argmax(axis=1)
    prediction = np.where(usable, best, -1)
    return table(
        {
            "label": label,
            "prediction": prediction,
            "correct": prediction == label,
            "loss": -np.take_along_axis(log_p, label[:, None], axis=1)[:, 0],
            "confidence": np.exp(np.where(usable, log_p.max(axis=1), np.nan)),
            "log_p": log_p,
        },
        usable,
    )


def _classes(cell: Outcomes) -> int:
    return int(cell["log_p"].shape[1])


def _hits(cell: Outcomes) -> np.ndarray:
    return cell["correct"].astype(np.float64)


def _macro_f1(cell: Outcomes, _: Outcomes) -> Sums:
    classes = _classes(cell)
    label, predicted = one_hot(cell["label"], classes), one_hot(cell["prediction"], classes)
    features = np.concatenate([label * predicted, label + predicted], axis=1)
    return Sums(features, lambda sums: f1(*np.split(sums, 2, axis=-1)))


def _mcc(cell: Outcomes, _: Outcomes) -> Sums:
    """Gorodkin's R_K, "Comparing two K-category assignments by a K-category correlation
    coefficient", Computational Biology and Chemistry 28 (2004) 367-374."""
    classes = _classes(cell)
    label, predicted = one_hot(cell["label"], classes), one_hot(cell["prediction"], classes)
    features = np.concatenate(
        [_hits(cell)[:, None], np.ones((len(cell), 1)), label, predicted], axis=1
    )

    def aggregate(sums: np.ndarray) -> np.ndarray:
        right, count = sums[..., 0], sums[..., 1]
        true, said = np.split(sums[..., 2:], 2, axis=-1)
        covariance = right * count - (true * said).sum(axis=-1)
        spread = (count**2 - (said**2).sum(axis=-1)) * (count**2 - (true**2).sum(axis=-1))
        return np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)  # type: ignore[no-any-return]

    return Sums(features, aggregate)


def _brier(cell: Outcomes, _: Outcomes) -> Sums:
    """Sum of squared probability errors over the classes (Brier 1950)."""
    error = np.exp(cell["log_p"]) - one_hot(cell["label"], _classes(cell))
    return mean((error**2).sum(axis=1))


def _recall(cell: Outcomes, _: Outcomes) -> Sums:
    label = one_hot(cell["label"], _classes(cell))
    return Sums(np.concatenate([label * _hits(cell)[:, None], label], axis=1), smallest_share)


def _ece(cell: Outcomes, _: Outcomes) -> Sums:
    """Sum over bins of |mean confidence - accuracy| weighted by size (Naeini et al. 2015)."""
    confidence = np.where(cell["scored"], cell["confidence"], 0.0)
    bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    member = one_hot(bins, ECE_BINS) * cell["scored"][:, None]
    gap = member * (confidence - _hits(cell))[:, None]
    features = np.concatenate([gap, member.sum(axis=1, keepdims=True)], axis=1)
    return Sums(features, lambda s: np.abs(s[..., :-1]).sum(axis=-1) / s[..., -1])


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats from log-probabilities, ``[n]``."""
    return (np.exp(p) * (p - q)).sum(axis=1)  # type: ignore[no-any-return]


def _jensen_shannon(cell: Outcomes, reference: Outcomes) -> Sums:
    p, q = reference["log_p"], cell["log_p"]
    middle = np.logaddexp(p, q) - np.log(2)
    return mean((_divergence(p, middle) + _divergence(q, middle)) / 2)


METRICS = named(
    Metric("accuracy", True, lambda c, r: mean(_hits(c)), paired.binary),
    Metric("macro_f1", True, _macro_f1, paired.bootstrap),
    Metric("mcc", True, _mcc, paired.bootstrap, share=False),
    Metric("worst_class_recall", True, _recall, paired.each_group),
    Metric("log_loss", False, lambda c, r: mean(c["loss"]), paired.bootstrap, share=False),
    Metric("brier", False, _brier, paired.bootstrap, share=False),
    Metric("ece", False, _ece, paired.bootstrap),
    Metric("kl_mean", False, lambda c, r: mean(_divergence(r["log_p"], c["log_p"])),
           paired.bootstrap, share=False),
    Metric("js_mean", False, _jensen_shannon, paired.bounded),
    Metric("flips_to_wrong", False, lambda c, r: mean(1.0 * (r["correct"] & ~c["correct"]))),
    Metric("flips_to_right", True, lambda c, r: mean(1.0 * (c["correct"] & ~r["correct"]))),
    Metric("flips", False, lambda c, r: mean(1.0 * (c["prediction"] != r["prediction"]))),
)  # fmt: skip
