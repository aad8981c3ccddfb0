"""Regression: one number, or several, an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from evaluators import paired
from evaluators.evaluator import (
    Evaluator,
    Progress,
    named,
    reals,
    run_rows,
    scored,
    silent,
    table,
)
from evaluators.metric import Metric, Outcomes, Sums, Weighted
from evaluators.statistics import mean, quantile, transformed
from halfstep.batches import answer
from halfstep.errors import UserError
from halfstep.examples import Examples


@dataclass(frozen=True)
class Regression(Evaluator):
    """The model returns ``[batch]`` or ``[batch, outputs]``; targets have the same shape.

    MAE, RMSE and R² as scikit-learn defines them (over all outputs together). ``bias`` is the
    absolute mean error, ``drift`` the mean distance to the reference's answers. The largest error
    is reported and not tested: no resampling tells how far beyond the worst one seen the next may
    lie.
    """

    headline: ClassVar[str] = "rmse"
    closeness: ClassVar[str] = "drift"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def check(self, pool: str, examples: Examples) -> None:
        super().check(pool, examples)
        target = reals(examples)
        bad = np.flatnonzero(~scored(target))
        if len(bad):
            raise UserError(f"{pool}: {len(bad)} target(s) are not finite, the first at {bad[0]}")

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        target = reals(examples)
        target = target.reshape(len(target), -1)

        def read(returned: Any, batch: Any, which: Any) -> dict[str, np.ndarray]:
            found = answer(returned).double().numpy()
            if found.reshape(len(found), -1).shape[1] != target.shape[1] or found.ndim > 2:
                raise UserError(
                    f"expected [batch, {target.shape[1]}] as the targets are; the model returned "
                    f"{list(found.shape)}"
                )
            return {"prediction": found.reshape(len(found), -1)}

        prediction = run_rows(model, examples.inputs, batch_size, read, progress)["prediction"]
        return table({"target": target, "prediction": prediction}, scored(prediction))


def _errors(cell: Outcomes) -> np.ndarray:
    found = cell["prediction"] - cell["target"]
    return np.where(cell["scored"][:, None], found, np.nan)  # type: ignore[no-any-return]


def _rmse(cell: Outcomes, _: Outcomes) -> Sums:
    return transformed(mean((_errors(cell) ** 2).mean(axis=1)), np.sqrt)


def _r2(cell: Outcomes, _: Outcomes) -> Sums:
    """From sums; several outputs are averaged, each with its own spread."""
    error, target = _errors(cell), cell["target"]
    usable = cell["scored"][:, None]
    error, centred = np.where(usable, error, 0.0), (target - target.mean(axis=0)) * usable
    outputs = target.shape[1]
    features = np.concatenate([error**2, centred**2, centred, usable.astype(np.float64)], axis=1)

    def aggregate(sums: np.ndarray) -> np.ndarray:
        parts = (sums[..., i * outputs : (i + 1) * outputs] for i in range(3))
        residual, square, total = parts
        spread = square - total**2 / sums[..., -1:]
        return (1 - residual / np.where(spread > 0, spread, np.nan)).mean(axis=-1)  # type: ignore[no-any-return]

    return Sums(features, aggregate)


def _largest(cell: Outcomes, _: Outcomes) -> Weighted:
    values = np.nan_to_num(np.abs(_errors(cell)).max(axis=1))
    return Weighted(len(cell), lambda counts: np.where(counts > 0, values, 0.0).max(axis=1))


METRICS = named(
    Metric("mae", False, lambda c, r: mean(np.abs(_errors(c)).mean(axis=1)), paired.bootstrap,
           share=False),
    Metric("rmse", False, _rmse, paired.bootstrap, share=False),
    Metric("r2", True, _r2, paired.bootstrap),
    Metric("p99_error", False, lambda c, r: quantile(np.abs(_errors(c)).max(axis=1), 0.99),
           paired.bootstrap, share=False),
    Metric("max_error", False, _largest, share=False),
    Metric("bias", False, lambda c, r: transformed(mean(_errors(c).mean(axis=1)), np.abs),
           paired.bootstrap, share=False),
    Metric("drift", False,
           lambda c, r: mean(np.abs(c["prediction"] - r["prediction"]).mean(axis=1)),
           paired.bootstrap, share=False),
)  # fmt: skip
