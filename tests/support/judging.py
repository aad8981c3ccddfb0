"""Cells and references of made-up hits, as the judge takes them."""

import numpy as np

from evaluators import classification
from evaluators.acceptance import Candidate
from evaluators.criterion import Criterion

ACCURACY = Criterion("accuracy", "max_drop", 0.01)
SIZE = Criterion("weight_bytes", "max_ratio", 0.5)


def outcomes(correct, classes=4):
    """Outcomes with given hits; labels go round the classes."""
    correct = np.asarray(correct, dtype=bool)
    label = np.arange(len(correct)) % classes
    best = np.where(correct, label, (label + 1) % classes)
    p = np.full((len(correct), classes), 0.1)
    p[np.arange(len(correct)), best] = 1 - 0.1 * (classes - 1)
    return classification.outcomes(label, np.log(p))


def candidate(name, correct, size=0.25):
    resources = {"weight_bytes": size * 1000, "bit_operations": 1.0}
    return Candidate(name, outcomes(correct), resources)


def flipped(base, losses, gains=0):
    """``base`` with that many hits lost and misses gained."""
    changed = base.copy()
    changed[np.flatnonzero(base)[:losses]] = False
    changed[np.flatnonzero(~base)[:gains]] = True
    return changed
