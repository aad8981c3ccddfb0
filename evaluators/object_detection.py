"""Object detection: boxes with classes and scores, by COCO's mean average precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from evaluators import paired
from evaluators.evaluator import Evaluator, Progress, named, run_rows, silent, table
from evaluators.metric import Metric, Outcomes, Weighted
from halfstep.errors import UserError
from halfstep.examples import Examples

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100
"""Detections an image that count, as in COCO's evaluation."""


@dataclass(frozen=True)
class ObjectDetection(Evaluator):
    """Targets are rows ``(class, x0, y0, x1, y1)`` an image, in the units of the model's boxes.

    The model returns what DETR-like models of transformers do (``logits`` ``[batch, queries,
    classes + 1]``, the last for "no object", and ``pred_boxes`` ``(cx, cy, w, h)``), or a list of
    mappings with ``scores``, ``labels`` and ``boxes`` ``(x0, y0, x1, y1)``.

    ``map`` averages precision over 101 recalls, IoU 0.50 to 0.95 and classes (Lin et al.,
    "Microsoft COCO", 2014; the evaluation code that came with it); ``map_50`` at IoU 0.5 alone.
    The bootstrap draws images.
    """

    headline: ClassVar[str] = "map"
    closeness: ClassVar[str] = "map"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def check(self, pool: str, examples: Examples) -> None:
        super().check(pool, examples)
        if examples.targets.shape[-1:] != (5,):
            raise UserError(f"{pool}: targets are rows of class, x0, y0, x1, y1")

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        rows = [examples.targets.row(i).double().numpy() for i in range(len(examples))]
        classes = 1 + int(max((r[:, 0].max() for r in rows if len(r)), default=0))

        def read(returned: Any, batch: Any, which: Any) -> dict[str, np.ndarray]:
            images = np.arange(len(examples))[which]
            found = [
                _match(*detections, rows[i])
                for i, detections in zip(images, _detections(returned), strict=True)
            ]
            return {name: np.stack([f[name] for f in found]) for name in found[0]}

        found = run_rows(model, examples.inputs, batch_size, read, progress)
        usable = found.pop("usable").astype(bool)
        found["objects"] = np.stack(
            [np.bincount(r[:, 0].astype(np.int64), minlength=classes) for r in rows]
        )
        return table(found, usable)


def _detections(returned: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(scores, classes, boxes) of each image."""
    if isinstance(returned, list):
        return [
            (r["scores"].double().numpy(), r["labels"].numpy(), r["boxes"].double().numpy())
            for r in returned
        ]
    logits, boxes = getattr(returned, "logits", None), getattr(returned, "pred_boxes", None)
    if not isinstance(logits, Tensor) or not isinstance(boxes, Tensor):
        raise UserError(
            "expected logits and pred_boxes, or a list of mappings with scores, labels and boxes; "
            f"the model returned {type(returned).__name__}"
        )
    score, kind = torch.softmax(logits.double(), -1)[..., :-1].max(-1)
    centre, size = boxes.double().split(2, dim=-1)
    corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
    return list(zip(score.numpy(), kind.numpy(), corners.numpy(), strict=True))


def _match(
    score: np.ndarray, kind: np.ndarray, boxes: np.ndarray, objects: np.ndarray
) -> dict[str, np.ndarray]:
    """Which detections of one image find an object, at each threshold: in order of their scores,
    each takes the free object of its class that it overlaps most."""
    usable = bool(np.isfinite(score).all() and np.isfinite(boxes).all())
    order = np.argsort(-np.nan_to_num(score), kind="stable")[:MOST] if usable else []
    found = {
        "score": np.full(MOST, np.nan),
        "kind": np.full(MOST, -1, dtype=np.int64),
        "matched": np.zeros((MOST, len(THRESHOLDS)), dtype=bool),
        "usable": np.array(usable),
    }
    if len(order) == 0:
        return found
    score, kind, boxes = score[order], kind[order], boxes[order]
    found["score"][: len(order)], found["kind"][: len(order)] = score, kind
    overlap = _overlap(boxes, objects[:, 1:]) * (kind[:, None] == objects[None, :, 0])
    for t, least in enumerate(THRESHOLDS):
        free = np.ones(len(objects), dtype=bool)
        for d in range(len(order)):
            candidates = np.where(free, overlap[d], -1.0)
            if len(candidates) and candidates.max() >= min(least, 1 - 1e-10):
                # Of equal ones the last, as in COCO's code.
                free[len(candidates) - 1 - int(candidates[::-1].argmax())] = False
                found["matched"][d, t] = True
    return found


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union, ``[len(one), len(other)]``."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    areas = [np.prod(np.clip(b[:, 2:] - b[:, :2], 0, None), axis=-1) for b in (one, other)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return shared / np.where(union > 0, union, 1.0)  # type: ignore[no-any-return]


def _mean_precision(thresholds: int) -> Any:
    """The mean over classes with objects and over the first IoU thresholds."""

    def statistic(cell: Outcomes, _: Outcomes) -> Weighted:
        image, slot = np.nonzero(cell["kind"] >= 0)
        kind, score = cell["kind"][image, slot], cell["score"][image, slot]
        matched = cell["matched"][image, slot, :thresholds]
        order = np.argsort(-score, kind="stable")
        image, kind, matched = image[order], kind[order], matched[order]
        classes = np.flatnonzero(cell["objects"].sum(axis=0))

        def function(counts: np.ndarray) -> np.ndarray:
            objects = counts @ cell["objects"]
            total = np.zeros((len(counts), len(classes)))
            for column, c in enumerate(classes):
                own = kind == c
                weight = counts[:, image[own]]
                seen = np.cumsum(weight, axis=1)
                for t in range(thresholds):
                    hits = np.cumsum(weight * matched[own, t], axis=1)
                    total[:, column] += _precision(hits, seen, objects[:, c])
            present = objects[:, classes] > 0
            kinds = present.sum(axis=1)
            shares = (total * present).sum(axis=1) / thresholds
            return np.where(kinds > 0, shares / np.where(kinds > 0, kinds, 1), np.nan)  # type: ignore[no-any-return]

        return Weighted(len(cell), function)

    return statistic


def _precision(hits: np.ndarray, seen: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Interpolated precision, averaged over `RECALLS`, a row a resample."""
    found = np.zeros(len(hits))
    if hits.shape[1] == 0:
        return found
    precision = hits / np.where(seen > 0, seen, 1.0)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = hits / np.where(objects > 0, objects, 1.0)[:, None]
    for i in range(len(hits)):
        at = np.searchsorted(recall[i], RECALLS, side="left")
        reached = at < recall.shape[1]
        found[i] = envelope[i, at[reached]].sum() / len(RECALLS)
    return found


METRICS = named(
    Metric("map", True, _mean_precision(len(THRESHOLDS)), paired.bootstrap),
    Metric("map_50", True, _mean_precision(1), paired.bootstrap),
)
