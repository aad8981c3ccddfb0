"""Evaluators: from a model and examples to per-example outcomes, metrics and verdicts."""

from __future__ import annotations

from evaluators.classification import Classification
from evaluators.evaluator import Evaluator
from evaluators.fidelity import Fidelity
from evaluators.language_modelling import LanguageModelling
from evaluators.multi_label import MultiLabel
from evaluators.object_detection import ObjectDetection
from evaluators.ranking import Ranking
from evaluators.regression import Regression
from evaluators.retrieval import Retrieval
from evaluators.semantic_segmentation import SemanticSegmentation
from evaluators.sentence_similarity import SentenceSimilarity
from evaluators.token_classification import TokenClassification
from halfstep.plugins import Known

_OWN: dict[str, type[Evaluator]] = {
    "image_classification": Classification,
    "text_classification": Classification,
    "audio_classification": Classification,
    "multi_label": MultiLabel,
    "regression": Regression,
    "sentence_similarity": SentenceSimilarity,
    "retrieval": Retrieval,
    "ranking": Ranking,
    "anomaly_detection": Ranking,
    "language_modelling": LanguageModelling,
    "token_classification": TokenClassification,
    "object_detection": ObjectDetection,
    "semantic_segmentation": SemanticSegmentation,
    "fidelity": Fidelity,
}

EVALUATORS: Known[type[Evaluator]] = Known(_OWN, "halfstep.evaluators", Evaluator)
"""Every evaluator by the name that configs use."""
