"""Retrieval: queries search the documents that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from evaluators import paired
from evaluators.embeddings import embed
from evaluators.evaluator import Evaluator, Progress, named, scored, silent, table
from evaluators.metric import Metric, Outcomes
from evaluators.statistics import mean
from halfstep.errors import UserError
from halfstep.examples import Examples

KEPT = 100
"""Ranks that are recorded."""
AT_ONCE = 256
"""Queries that are compared with all documents in one product: bounds the memory."""


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """Examples are queries of one row; the documents are the rows that all share; the model returns
    an embedding a row. A query's target is a list of (document, gain), documents counted from 0.

    nDCG with gains as they are and logarithmic discount (Järvelin and Kekäläinen 2002), recall,
    reciprocal rank; ``overlap`` is the share of the reference's first k that are found among the
    first k; ``drift`` one minus the cosine of a query's embedding to the reference's.
    The bootstrap draws queries. Where several share a cluster, say so with ``cluster``.
    """

    k: int = 10

    headline: ClassVar[str] = "ndcg"
    closeness: ClassVar[str] = "drift"
    separable: ClassVar[bool] = False
    """Every document is embedded, however few the queries."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= KEPT:
            raise UserError(f"retrieval: k {self.k} is not allowed: 1 to {KEPT}")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        k = self.k
        return named(
            Metric("ndcg", True, lambda c, r: mean(c["ndcg"]), paired.bounded),
            Metric("recall", True, lambda c, r: mean(c["recall"]), paired.bounded),
            Metric("mrr", True, lambda c, r: mean(c["reciprocal_rank"]), paired.bounded),
            Metric("hit_first", True, lambda c, r: mean(c["hit_first"]), paired.binary),
            Metric("overlap", True, lambda c, r: mean(_overlap(c, r, k)), paired.bounded),
            Metric("drift", False, lambda c, r: mean(_drift(c, r)), paired.bootstrap),
        )

    def check(self, pool: str, examples: Examples) -> None:
        super().check(pool, examples)
        if len(examples.shared) == 0:
            raise UserError(f"{pool}: queries have no documents to search")
        for i in range(len(examples)):
            found = examples.targets.row(i)
            if len(found) == 0 or not bool((found[:, 1] > 0).any()):
                raise UserError(f"{pool}: query {i} has no relevant document")
            if int(found[:, 0].max()) >= len(examples.shared):
                raise UserError(
                    f"{pool}: query {i} names document {int(found[:, 0].max())}, there are "
                    f"{len(examples.shared)}"
                )

    def rehearsal(self, examples: Examples) -> Examples:
        few = examples.take(np.arange(1))
        assert few.members is not None
        rows = np.concatenate([few.members.ravel(), few.shared[:1]])
        return Examples(
            few.inputs.take(rows), few.targets, np.array([[0]]), np.array([len(rows) - 1])
        )

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        assert examples.members is not None
        rows = embed(model, examples, batch_size, progress)
        documents, queries = rows[examples.shared], rows[examples.members[:, 0]]
        usable = scored(queries) & bool(np.isfinite(documents).all())
        kept = min(KEPT, len(documents))
        ranking = np.full((len(queries), kept), -1, dtype=np.int64)
        for start in range(0, len(queries), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            cosine = np.nan_to_num(queries[part]) @ np.nan_to_num(documents).T
            # A stable sort: equal documents keep their order, whatever the machine.
            ranking[part] = np.argsort(-cosine, axis=1, kind="stable")[:, :kept]
        measured = [
            _measure(ranking[i], examples.targets.row(i).numpy(), self.k)
            for i in range(len(queries))
        ]
        names = ("ndcg", "recall", "reciprocal_rank", "hit_first")
        columns = dict(zip(names, np.array(measured).T, strict=True))
        columns = {name: np.where(usable, values, 0.0) for name, values in columns.items()}
        return table({**columns, "ranking": ranking, "embedding": queries}, usable)


def _measure(ranking: np.ndarray, relevant: np.ndarray, k: int) -> tuple[float, ...]:
    """nDCG, recall, reciprocal rank and "is the first one relevant" of one query."""
    gains = {int(document): float(gain) for document, gain in relevant if gain > 0}
    found = np.array([gains.get(int(d), 0.0) for d in ranking])
    discount = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.sort(list(gains.values()))[::-1][:k]
    best = float((ideal * discount[: len(ideal)]).sum())
    ndcg = float((found[:k] * discount[: len(found[:k])]).sum()) / best
    at = np.flatnonzero(found > 0)
    return (
        ndcg,
        float((found[:k] > 0).sum()) / len(gains),
        1.0 / (at[0] + 1) if len(at) else 0.0,
        float(len(found) > 0 and found[0] > 0),
    )


def _overlap(cell: Outcomes, reference: Outcomes, k: int) -> np.ndarray:
    ours, theirs = cell["ranking"][:, :k], reference["ranking"][:, :k]
    return (ours[:, :, None] == theirs[:, None, :]).any(axis=1).mean(axis=1)  # type: ignore[no-any-return]


def _drift(cell: Outcomes, reference: Outcomes) -> np.ndarray:
    ours, theirs = (o["embedding"].astype(np.float64) for o in (cell, reference))
    return 1 - (ours * theirs).sum(axis=1)  # type: ignore[no-any-return]
