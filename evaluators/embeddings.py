"""Embeddings of rows and the cosines between them: what similarity, retrieval and ranking share."""

from __future__ import annotations

import numpy as np
from torch import nn

from evaluators.evaluator import Progress, run_rows, tensor_of
from halfstep.errors import UserError
from halfstep.examples import Examples

WANTED = "embeddings [batch, size]"


def embed(model: nn.Module, examples: Examples, batch_size: int, progress: Progress) -> np.ndarray:
    """Every row's embedding, float32 ``[rows, size]``, of length 1; NaN where there is none."""
    found = run_rows(
        model,
        examples.inputs,
        batch_size,
        lambda returned, batch, which: {"e": tensor_of(returned, 2, WANTED).numpy()},
        progress,
    )["e"].astype(np.float64)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    usable = np.isfinite(length) & (length > 0)
    return np.where(usable, found / np.where(usable, length, 1.0), np.nan).astype(np.float32)


def pair_cosines(rows: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Cosine of each pair's two rows, float64 ``[pairs]``."""
    one, other = (rows[members[:, i]].astype(np.float64) for i in (0, 1))
    return (one * other).sum(axis=1)  # type: ignore[no-any-return]


def check_pairs(pool: str, examples: Examples) -> None:
    """Raises UserError where examples are not pairs of rows."""
    if examples.members is None or examples.members.shape[1] != 2:
        count = 1 if examples.members is None else examples.members.shape[1]
        raise UserError(
            f"{pool}: pairs are expected, two rows an example, but each has {count}; name two text "
            "columns in the data's inputs"
        )
