"""The statistics that metrics are made of: sums of features, and weighted ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evaluators.metric import Sums, Weighted


def ratio(sums: np.ndarray) -> np.ndarray:
    """Of two sums."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]  # type: ignore[no-any-return]


def mean(values: np.ndarray) -> Sums:
    """Over the examples that have a value; NaN is none."""
    seen = np.isfinite(values)
    features = np.stack([np.where(seen, values, 0.0), seen], axis=1).astype(np.float64)
    return Sums(features, ratio)


def pooled(sums: np.ndarray, counts: np.ndarray) -> Sums:
    """``sum(sums) / sum(counts)``: a mean over what examples hold several of (tokens, pixels)."""
    return Sums(np.stack([sums, counts], axis=1).astype(np.float64), ratio)


def one_hot(index: np.ndarray, classes: int) -> np.ndarray:
    """float64 ``[n, classes]``; all zero where the index is none of them."""
    return (index[:, None] == np.arange(classes)).astype(np.float64)


def f1(hits: np.ndarray, either: np.ndarray) -> np.ndarray:
    """Mean over kinds that occur of ``2 hits / (labelled + predicted)`` (scikit-learn's macro)."""
    present = either > 0
    each = np.where(present, 2 * hits / np.where(present, either, 1.0), 0.0)
    kinds = present.sum(axis=-1)
    return each.sum(axis=-1) / np.where(kinds > 0, kinds, 1)  # type: ignore[no-any-return]


def smallest_share(sums: np.ndarray) -> np.ndarray:
    """The smallest ``hits / total`` over the kinds that occur; features: hits, then totals."""
    hits, total = np.split(sums, 2, axis=-1)
    present = total > 0
    return np.where(present, hits / np.where(present, total, 1.0), np.inf).min(axis=-1)  # type: ignore[no-any-return]


def _ordered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the values, and where each run of equal ones starts in it."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    return order, np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])


def _ranks(counts: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Mean rank of each example among ``counts`` copies of all, ties sharing theirs: ``[r, n]``."""
    weight = np.add.reduceat(counts[:, order], starts, axis=1)
    rank = np.cumsum(weight, axis=1) - weight + (weight + 1) / 2
    spread = np.repeat(rank, np.diff(np.r_[starts, len(order)]), axis=1)
    found = np.empty_like(spread)
    found[:, order] = spread
    return found


def spearman(values: np.ndarray, targets: np.ndarray) -> Weighted:
    """Rank correlation (Spearman 1904), ties at their mean rank."""
    ours, theirs = _ordered(values), _ordered(targets)

    def function(counts: np.ndarray) -> np.ndarray:
        a, b = _ranks(counts, *ours), _ranks(counts, *theirs)
        total = counts.sum(axis=1, keepdims=True)
        a -= (counts * a).sum(axis=1, keepdims=True) / total
        b -= (counts * b).sum(axis=1, keepdims=True) / total
        across = (counts * a * b).sum(axis=1)
        both = (counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1)
        return np.where(both > 0, across / np.sqrt(np.where(both > 0, both, 1.0)), 0.0)  # type: ignore[no-any-return]

    return Weighted(len(values), function)


def pearson(values: np.ndarray, targets: np.ndarray) -> Sums:
    """Linear correlation, from the five sums."""
    x, y = values - values.mean(), targets - targets.mean()  # near zero, where sums lose no digits
    features = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)

    def aggregate(sums: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
        both = (n * sxx - sx * sx) * (n * syy - sy * sy)
        root = np.sqrt(np.where(both > 0, both, 1.0))
        return np.where(both > 0, (n * sxy - sx * sy) / root, 0.0)  # type: ignore[no-any-return]

    return Sums(features.astype(np.float64), aggregate)


def auroc(scores: np.ndarray, positive: np.ndarray) -> Weighted:
    """Area under the ROC curve: the share of (positive, negative) pairs in order, ties half
    (Mann and Whitney 1947)."""
    order, starts = _ordered(scores)

    def function(counts: np.ndarray) -> np.ndarray:
        up = np.add.reduceat((counts * positive)[:, order], starts, axis=1)
        down = np.add.reduceat((counts * ~positive)[:, order], starts, axis=1)
        below = np.cumsum(down, axis=1) - down / 2
        return (up * below).sum(axis=1) / (up.sum(axis=1) * down.sum(axis=1))  # type: ignore[no-any-return]

    return Weighted(len(scores), function)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> Weighted:
    """``sum (recall_k - recall_{k-1}) precision_k`` over thresholds (scikit-learn's definition)."""
    order, starts = _ordered(-scores)

    def function(counts: np.ndarray) -> np.ndarray:
        up = np.add.reduceat((counts * positive)[:, order], starts, axis=1)
        every = np.add.reduceat(counts[:, order], starts, axis=1)
        seen = np.cumsum(every, axis=1)
        precision = np.cumsum(up, axis=1) / np.where(seen > 0, seen, 1.0)
        return (up * precision).sum(axis=1) / up.sum(axis=1)  # type: ignore[no-any-return]

    return Weighted(len(scores), function)


def quantile(values: np.ndarray, share: float) -> Weighted:
    """The smallest value that at least ``share`` of the examples do not exceed; NaN is no value."""
    values = np.where(np.isfinite(values), values, np.inf)
    order = np.argsort(values, kind="stable")
    ranked, missing = values[order], ~np.isfinite(values)

    def function(counts: np.ndarray) -> np.ndarray:
        counts = np.where(missing, 0.0, counts)
        reached = np.cumsum(counts[:, order], axis=1)
        at = (reached < share * reached[:, -1:] - 1e-9).sum(axis=1)
        return ranked[np.minimum(at, len(ranked) - 1)]  # type: ignore[no-any-return]

    return Weighted(len(values), function)


def transformed(sums: Sums, change: Callable[[np.ndarray], np.ndarray]) -> Sums:
    """A function of a statistic."""
    return Sums(sums.features, lambda s: change(sums.aggregate(s)))
