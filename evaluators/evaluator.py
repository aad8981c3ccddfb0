"""What an evaluator is: from a model and examples to a table of outcomes, and metrics over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from evaluators.metric import SCORED, Metric, Outcomes, blank
from halfstep.batches import Batch, answer, forward
from halfstep.errors import UserError
from halfstep.examples import Column, Examples, Index, Inputs

Progress = Callable[[int], None]


def silent(done: int) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True)
class Evaluator:
    """Base of all evaluators. Their fields are the options that a config may give.

    A third party's evaluator is a frozen dataclass derived from this one, listed as an entry point
    of the group ``halfstep.evaluators``.
    """

    headline: ClassVar[str]
    """The metric that summaries and plots show."""
    closeness: ClassVar[str]
    """Of equally cheap accepted cells, the one that this metric finds closest is taken."""

    separable: ClassVar[bool] = True
    """False where evaluating some of the examples costs much of what all of them do: then cells are
    never stopped early."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Every metric by its name."""
        raise NotImplementedError

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        """One pass over the examples; ``progress`` is told how many rows each batch adds.

        ``reference``: the full-precision subject's outcomes on the same examples; None while those
        are made.
        """
        raise NotImplementedError

    def check(self, pool: str, examples: Examples) -> None:
        """Raises UserError where the examples cannot be evaluated, before any model is run."""
        if len(examples) == 0:
            raise UserError(f"{pool} holds no examples")
        for name, column in examples.inputs.columns.items():
            if column.dtype.is_floating_point:
                _check_finite(pool, name, column)

    def rehearsal(self, examples: Examples) -> Examples:
        """The few examples that a run would fail on, if it fails on any: they are run before
        anything is recorded."""
        return examples.take(np.arange(min(2, len(examples))))

    def measure(self, cell: Outcomes, reference: Outcomes) -> dict[str, float]:
        """Every metric of a cell, tested or not."""
        return {name: metric.value(cell, reference) for name, metric in self.metrics.items()}


def _check_finite(pool: str, name: str, column: Column) -> None:
    bad = []
    step = 1024
    for start in range(0, len(column), step):
        if column.offsets is None:
            rows = column.rows(slice(start, start + step))
        else:
            rows = torch.stack(
                [column.row(i).sum() for i in range(start, min(start + step, len(column)))]
            )
        # NaN and infinity both survive into the extremes, which are ten times cheaper to find.
        if rows.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(rows))).all()):
            wrong = ~torch.isfinite(rows.reshape(len(rows), -1)).all(dim=1)
            bad += (wrong.nonzero().flatten() + start).tolist()
    if bad:
        where = f" of {name!r}" if name else ""
        raise UserError(
            f"{pool} holds NaN or infinite values{where} in {len(bad)} example(s), the first at "
            f"row {bad[0]}"
        )


def run_rows(
    model: nn.Module,
    inputs: Inputs,
    batch_size: int,
    read: Callable[[Any, Batch, Index], Mapping[str, np.ndarray]],
    progress: Progress,
) -> dict[str, np.ndarray]:
    """One forward pass over all rows; what ``read`` makes of each batch, in order of the rows.

    ``read`` gets what the model returned, the batch and which rows it holds; it returns arrays
    ``[batch, …]``, whose later axes may differ from batch to batch (lengths): the rest is filled
    with NaN, or -1 where whole numbers are held.
    """
    tables: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for which, batch in inputs.batches(batch_size):
            found = read(forward(model, batch), batch, which)
            for name, values in found.items():
                if name not in tables:
                    tables[name] = blank((len(inputs), *values.shape[1:]), values.dtype)
                tables[name] = _wide_enough(tables[name], values.shape[1:])
                tables[name][which, *(slice(s) for s in values.shape[1:])] = values
            progress(len(next(iter(found.values()))))
    return tables


def _wide_enough(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    wanted = tuple(max(a, b) for a, b in zip(table.shape[1:], shape, strict=True))
    if wanted == table.shape[1:]:
        return table
    wider = blank((len(table), *wanted), table.dtype)
    wider[:, *(slice(s) for s in table.shape[1:])] = table
    return wider


def tensor_of(returned: Any, dimensions: int, what: str) -> Tensor:
    """The model's main tensor, float32, checked for its number of axes.

    ``what``: what it should be, for the message: ``logits [batch, classes]``.
    """
    try:
        found = answer(returned)
    except TypeError as error:
        raise UserError(f"expected {what}; {error}") from None
    if found.dim() != dimensions:
        raise UserError(f"expected {what}; the model returned {list(found.shape)}")
    return found


def scored(values: np.ndarray) -> np.ndarray:
    """True for the rows without NaN or infinity."""
    return np.isfinite(values.reshape(len(values), -1)).all(axis=1)  # type: ignore[no-any-return]


def table(values: Mapping[str, np.ndarray], usable: np.ndarray) -> Outcomes:
    return Outcomes({**values, SCORED: usable})


def integers(examples: Examples) -> np.ndarray:
    """Targets that are whole numbers, int64 ``[n, …]``."""
    return examples.targets.all().numpy().astype(np.int64)


def reals(examples: Examples) -> np.ndarray:
    """Targets as float64 ``[n, …]``."""
    return examples.targets.all().numpy().astype(np.float64)


def named(*metrics: Metric) -> Mapping[str, Metric]:
    return {metric.name: metric for metric in metrics}
