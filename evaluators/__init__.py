"""Evaluators: from a model and examples to per-example outcomes, metrics and verdicts."""

from __future__ import annotations

from evaluators.image_classification import ImageClassification

EVALUATORS: dict[str, ImageClassification] = {
    "image_classification": ImageClassification(),
}
"""Every evaluator by the name that configs use."""
