"""Numbers as they stand in a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halfstep.errors import UserError
from halfstep.examples import POSITIONAL
from sources.prepared import Row
from sources.transforms.base import Chunk, Made, Table, Target, chunks


@dataclass(frozen=True)
class Values:
    """Columns of numbers as one float32 row, each standardised by the training pool's mean and
    standard deviation where ``standardize`` is left on."""

    columns: tuple[str, ...]
    standardize: bool = True
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Means and standard deviations; found in the training pool where a config does not say."""

    @property
    def identity(self) -> dict[str, object]:
        return {}

    def fitted(self, tables: Mapping[str, Table]) -> Values:
        """With the moments of the training pool."""
        if not self.standardize or self.moments is not None:
            return self
        if "train" not in tables:
            raise UserError(
                "values.standardize needs a pool 'train' to take means from; the data has "
                f"{sorted(tables)}: give moments, or standardize: false"
            )
        count, total, square = 0, np.zeros(len(self.columns)), np.zeros(len(self.columns))
        for chunk in chunks(tables["train"]):
            rows = self._numbers(chunk)
            rows = rows[np.isfinite(rows).all(axis=1)]
            count, total, square = count + len(rows), total + rows.sum(0), square + (rows**2).sum(0)
        mean = total / count
        deviation = np.sqrt(np.maximum(square / count - mean**2, 0))
        deviation = np.where(deviation > 0, deviation, 1.0)
        moments = (tuple(mean.tolist()), tuple(deviation.tolist()))
        return Values(self.columns, self.standardize, moments)

    def _numbers(self, chunk: Chunk) -> np.ndarray:
        columns = []
        for name in self.columns:
            try:
                values = [np.nan if v is None else float(v) for v in chunk[name]]
            except (TypeError, ValueError) as error:
                raise UserError(f"column {name!r} does not hold numbers ({error})") from None
            columns.append(values)
        return np.array(columns, dtype=np.float64).T

    def rows(self, chunk: Chunk, targets: list[Any], target: Target, told: dict[str, int]) -> Made:
        numbers = self._numbers(chunk)
        if self.standardize:
            assert self.moments is not None
            mean, deviation = self.moments
            numbers = (numbers - mean) / deviation
        for i, row in enumerate(numbers.astype(np.float32)):
            if np.isfinite(row).all():
                yield i, Row([{POSITIONAL: row}], target(targets[i]))
            else:
                bad = self.columns[int(np.flatnonzero(~np.isfinite(row))[0])]
                yield i, f"column {bad!r} holds no number"


@dataclass(frozen=True)
class Arrays:
    """Columns of arrays, each an argument of the model: ``{pixel_values: column}``. The name
    ``input`` passes a lone one by position."""

    arguments: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.arguments.values())

    @property
    def identity(self) -> dict[str, object]:
        return {}

    def rows(self, chunk: Chunk, targets: list[Any], target: Target, told: dict[str, int]) -> Made:
        lone = list(self.arguments) == ["input"]
        for i in range(len(targets)):
            given = {}
            for argument, column in self.arguments.items():
                value = np.asarray(chunk[column][i])
                kept = (
                    np.int64 if value.dtype.kind in "iu" and self.dtype == "int64" else self.dtype
                )
                given[POSITIONAL if lone else argument] = value.astype(kept)
            yield i, Row([given], target(targets[i]))
