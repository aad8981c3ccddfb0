"""Semantic segmentation: one class a pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from evaluators import paired
from evaluators.evaluator import Evaluator, Progress, named, run_rows, silent, table, tensor_of
from evaluators.metric import Metric, Outcomes, Sums
from evaluators.statistics import pooled, smallest_share
from halfstep.errors import UserError
from halfstep.examples import Examples

WANTED = "logits [batch, classes, height, width]"


@dataclass(frozen=True)
class SemanticSegmentation(Evaluator):
    """Targets are class numbers a pixel ``[height, width]``; ``ignore`` marks pixels that do not
    count. Logits of another size are brought to the targets' bilinearly, as transformers does.

    Mean intersection over union (Everingham et al., "The PASCAL visual object classes", 2010) over
    the classes that occur, from counts summed over images; the worst class's; pixel accuracy.
    """

    ignore: int = 255

    headline: ClassVar[str] = "miou"
    closeness: ClassVar[str] = "pixel_accuracy"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        def read(returned: Any, batch: Any, which: Any) -> dict[str, np.ndarray]:
            logits = tensor_of(returned, 4, WANTED).float()
            target = examples.targets.rows(which).long()
            if target.shape[1:] != logits.shape[2:]:
                logits = F.interpolate(logits, tuple(target.shape[1:]), mode="bilinear")
            classes = logits.shape[1]
            counted = target != self.ignore
            if bool((counted & ((target < 0) | (target >= classes))).any()):
                worst = target[counted & ((target < 0) | (target >= classes))]
                raise UserError(
                    f"labels hold class {int(worst[0])}, the model answers with {classes}, 0 to "
                    f"{classes - 1} (pixels that do not count are {self.ignore}: option ignore)"
                )
            said = logits.argmax(1)
            usable = torch.isfinite(logits).flatten(1).all(1)

            def count(*masks: torch.Tensor) -> np.ndarray:
                return np.stack([m.flatten(1).sum(1).numpy() for m in masks], axis=1)

            hit = counted & (said == target)
            return {
                "hits": count(*(hit & (target == c) for c in range(classes))),
                "label_pixels": count(*(counted & (target == c) for c in range(classes))),
                "given_pixels": count(*(counted & (said == c) for c in range(classes))),
                "usable": usable.numpy(),
            }

        found = run_rows(model, examples.inputs, batch_size, read, progress)
        usable = found.pop("usable").astype(bool)
        found["hits"] = np.where(usable[:, None], found["hits"], 0)
        return table(found, usable)


def _overlaps(cell: Outcomes) -> np.ndarray:
    hits = cell["hits"].astype(np.float64)
    union = cell["label_pixels"] + cell["given_pixels"] - hits
    return np.concatenate([hits, union], axis=1)


def _mean_overlap(sums: np.ndarray) -> np.ndarray:
    hits, union = np.split(sums, 2, axis=-1)
    present = union > 0
    each = np.where(present, hits / np.where(present, union, 1.0), 0.0)
    return each.sum(axis=-1) / present.sum(axis=-1)  # type: ignore[no-any-return]


def _pixel_accuracy(cell: Outcomes, _: Outcomes) -> Sums:
    return pooled(cell["hits"].sum(axis=1), cell["label_pixels"].sum(axis=1))


METRICS = named(
    Metric("miou", True, lambda c, r: Sums(_overlaps(c), _mean_overlap), paired.bootstrap),
    Metric("worst_class_iou", True, lambda c, r: Sums(_overlaps(c), smallest_share),
           paired.bootstrap),
    Metric("pixel_accuracy", True, _pixel_accuracy, paired.bootstrap),
)  # fmt: skip
