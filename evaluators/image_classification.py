"""Image classification: outcomes from logits, and the metrics that teams accept models by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from evaluators import paired
from evaluators.metric import Metric, Outcomes, PairedTest
from halfstep.errors import UserError
from halfstep.subject import Examples

ECE_BINS = 15


@dataclass(frozen=True, eq=False)
class ClassificationOutcomes:
    """What a classifier answered, example by example."""

    label: np.ndarray
    """int64 ``[n]``."""
    log_probability: np.ndarray
    """float64 ``[n, classes]``: log-softmax of the logits; NaN rows could not be scored."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def scored(self) -> np.ndarray:
        return np.isfinite(self.log_probability).all(axis=1)

    @property
    def unscored(self) -> int:
        return int((~self.scored).sum())

    @property
    def prediction(self) -> np.ndarray:
        """The most probable class; -1 where there was no usable output."""
        best = np.where(self.scored[:, None], self.log_probability, 0.0).argmax(axis=1)
        return np.where(self.scored, best, -1)

    @property
    def correct(self) -> np.ndarray:
        return (self.prediction == self.label).astype(np.float64)

    @property
    def loss(self) -> np.ndarray:
        """Negative log-probability of the label; NaN where unscored."""
        return -np.take_along_axis(self.log_probability, self.label[:, None], axis=1)[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        return np.exp(np.where(self.scored, self.log_probability.max(axis=1), np.nan))

    def divergence(self, reference: ClassificationOutcomes) -> np.ndarray:
        """KL(reference || cell) in nats, ``[n]``."""
        p = np.exp(reference.log_probability)
        return (p * (reference.log_probability - self.log_probability)).sum(axis=1)

    def columns(self) -> dict[str, np.ndarray]:
        table = {
            "label": self.label,
            "prediction": self.prediction,
            "correct": self.correct.astype(bool),
            "loss": self.loss,
            "confidence": self.confidence,
            "scored": self.scored,
        }
        classes = self.log_probability.shape[1]
        return table | {f"log_p_{c}": self.log_probability[:, c] for c in range(classes)}

    @staticmethod
    def from_columns(table: Mapping[str, np.ndarray]) -> ClassificationOutcomes:
        classes = sum(name.startswith("log_p_") for name in table)
        log_p = np.stack([table[f"log_p_{c}"] for c in range(classes)], axis=1)
        return ClassificationOutcomes(table["label"], log_p)


def _mean(sums: np.ndarray) -> np.ndarray:
    """Features: (value, 1)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]  # type: ignore[no-any-return]


def _per_example(values: np.ndarray) -> np.ndarray:
    """(value, 1) where there is a value, (0, 0) where it is NaN: a mean over what was scored."""
    seen = np.isfinite(values)
    return np.stack([np.where(seen, values, 0.0), seen.astype(np.float64)], axis=1)


def _one_hot(index: np.ndarray, classes: int) -> np.ndarray:
    return (index[:, None] == np.arange(classes)).astype(np.float64)


def _macro_f1_features(cell: ClassificationOutcomes, _: ClassificationOutcomes) -> np.ndarray:
    classes = cell.log_probability.shape[1]
    label, predicted = _one_hot(cell.label, classes), _one_hot(cell.prediction, classes)
    return np.concatenate([label * predicted, label + predicted], axis=1)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean over classes that occur of ``2 TP / (labelled + predicted)`` (scikit-learn's macro)."""
    hits, either = np.split(sums, 2, axis=-1)
    present = either > 0
    f1 = np.where(present, 2 * hits / np.where(present, either, 1.0), 0.0)
    return f1.sum(axis=-1) / present.sum(axis=-1)  # type: ignore[no-any-return]


def _recall_features(cell: ClassificationOutcomes, _: ClassificationOutcomes) -> np.ndarray:
    label = _one_hot(cell.label, cell.log_probability.shape[1])
    return np.concatenate([label * cell.correct[:, None], label], axis=1)


def _worst_recall(sums: np.ndarray) -> np.ndarray:
    """Smallest recall over the classes that occur."""
    hits, total = np.split(sums, 2, axis=-1)
    present = total > 0
    return np.where(present, hits / np.where(present, total, 1.0), np.inf).min(axis=-1)  # type: ignore[no-any-return]


def _calibration_features(cell: ClassificationOutcomes, _: ClassificationOutcomes) -> np.ndarray:
    confidence = np.where(cell.scored, cell.confidence, 0.0)
    bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    member = _one_hot(bins, ECE_BINS) * cell.scored[:, None]
    gap = member * (confidence - cell.correct)[:, None]
    return np.concatenate([gap, member.sum(axis=1, keepdims=True)], axis=1)


def _calibration_error(sums: np.ndarray) -> np.ndarray:
    """Sum over bins of |mean confidence - accuracy| weighted by size (Naeini et al. 2015)."""
    return np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]  # type: ignore[no-any-return]


def _metric(
    name: str,
    higher_is_better: bool,
    test: PairedTest | None,
    features: Callable[[ClassificationOutcomes, ClassificationOutcomes], np.ndarray],
    aggregate: Callable[[np.ndarray], np.ndarray] = _mean,
) -> Metric:
    return Metric(name, higher_is_better, test, features, aggregate)  # type: ignore[arg-type]


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in [
        _metric("accuracy", True, paired.binary, lambda c, r: _per_example(c.correct)),
        _metric("macro_f1", True, paired.bootstrap, _macro_f1_features, _macro_f1),
        _metric("worst_class_recall", True, paired.each_group, _recall_features, _worst_recall),
        _metric("log_loss", False, paired.bootstrap, lambda c, r: _per_example(c.loss)),
        _metric("ece", False, paired.bootstrap, _calibration_features, _calibration_error),
        _metric("kl_mean", False, paired.bootstrap, lambda c, r: _per_example(c.divergence(r))),
        _metric(
            "flips_to_wrong",
            False,
            None,
            lambda c, r: _per_example((r.correct > c.correct).astype(float)),
        ),
        _metric(
            "flips_to_right",
            True,
            None,
            lambda c, r: _per_example((c.correct > r.correct).astype(float)),
        ),
        _metric(
            "flips",
            False,
            None,
            lambda c, r: _per_example((c.prediction != r.prediction).astype(float)),
        ),
    ]
}


@dataclass(frozen=True)
class ImageClassification:
    """One label an image; the model returns logits ``[batch, classes]``."""

    name: str = "image_classification"
    metrics: Mapping[str, Metric] = None  # type: ignore[assignment]
    headline: str = "accuracy"
    """The metric that summaries and plots show."""
    closeness: str = "kl_mean"
    """Of equally cheap accepted cells, the one with the least of this is taken."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", METRICS)

    def check(self, pool: str, examples: Examples) -> None:
        """Raises UserError where the examples cannot be evaluated."""
        if len(examples) == 0:
            raise UserError(f"{pool} holds no examples")
        # NaN and infinity both survive into the extremes, which are ten times cheaper to find.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(examples.inputs))).all()):
            bad = (~torch.isfinite(examples.inputs.flatten(1)).all(dim=1)).nonzero().flatten()
            raise UserError(
                f"{pool} holds NaN or infinite values in {len(bad)} example(s), the first at "
                f"row {int(bad[0])}"
            )

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> ClassificationOutcomes:
        """One pass over the examples; ``progress`` is told how many each batch adds."""
        logits = []
        with torch.no_grad():
            for batch in examples.inputs.split(batch_size):
                logits.append(model(batch))
                progress(len(batch))
        stacked = torch.cat(logits)
        if stacked.dim() != 2:
            raise UserError(
                f"image classification needs logits [batch, classes]; the model returned "
                f"{list(stacked.shape)}"
            )
        labels = examples.targets.numpy()
        if labels.min() < 0 or labels.max() >= stacked.shape[1]:
            raise UserError(
                f"labels run from {labels.min()} to {labels.max()} but the model answers with "
                f"{stacked.shape[1]} classes"
            )
        log_p = torch.log_softmax(stacked.double(), dim=1).numpy()
        return ClassificationOutcomes(labels, log_p)

    def read(self, table: Mapping[str, np.ndarray]) -> ClassificationOutcomes:
        """Outcomes from their recorded columns."""
        return ClassificationOutcomes.from_columns(table)

    def measure(self, cell: Outcomes, reference: Outcomes) -> dict[str, float]:
        """Every metric of a cell, tested or not."""
        return {name: metric.value(cell, reference) for name, metric in self.metrics.items()}
