"""Data from a Python function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from halfstep.digest import digest_json
from halfstep.errors import UserError
from halfstep.examples import Column, Examples, Inputs
from sources.context import Context, Pools
from sources.tabular import KINDS, Tabular
from sources.targets import resolve


@dataclass(frozen=True, kw_only=True)
class Factory(Tabular):
    """``target`` is ``module:function``; it returns a mapping of pool name to one of

    - ``(inputs, targets)``: a tensor ``[n, …]``, or a mapping of arguments to such, with targets;
    - `halfstep.examples.Examples`;
    - rows: a list of mappings, or a ``datasets.Dataset``; then one transform says what becomes of
      them, as for every table.
    """

    target: str
    arguments: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(getattr(self, kind) is not None for kind in KINDS):
            super().__post_init__()

    def for_subject(self, processor: str | None) -> Tabular:
        return super().for_subject(processor) if self._tabular else self

    @property
    def _tabular(self) -> bool:
        return any(getattr(self, kind) is not None for kind in KINDS)

    def load(self, context: Context) -> Pools:
        made = resolve(self.target)(**self.arguments)
        if not isinstance(made, Mapping):
            raise UserError(
                f"data factory {self.target!r} returned {type(made).__name__}; it must return a "
                "mapping of pool name to (inputs, targets), Examples or rows"
            )
        if self._tabular:
            tables = {name: _table(name, rows, self.target) for name, rows in made.items()}
            identity = {name: _content(table) for name, table in tables.items()}
            return self.pools(tables, identity, context)
        return self.carved({name: _examples(v, self.target) for name, v in made.items()})


def _examples(value: Any, function: str) -> Examples:
    if isinstance(value, Examples):
        return value
    if not isinstance(value, tuple) or len(value) != 2:
        raise UserError(
            f"data factory {function!r}: a pool is {type(value).__name__}; (inputs, targets) or "
            "Examples are expected, or rows with one of "
            f"{', '.join(KINDS)} saying what becomes of them"
        )
    inputs, targets = value
    if isinstance(inputs, Mapping):
        made = Inputs({name: Column.of(_single(x)) for name, x in inputs.items()})
    else:
        made = Inputs.of(_single(inputs))
    targets = torch.as_tensor(targets)
    return Examples(made, Column.of(targets if targets.is_floating_point() else targets.long()))


def _single(values: Any) -> torch.Tensor:
    """As a tensor; fractions as float32, which is what models hold."""
    found = torch.as_tensor(values)
    return found.float() if found.is_floating_point() else found


def _table(name: str, rows: Any, function: str) -> Any:
    import datasets

    if isinstance(rows, datasets.Dataset):
        return rows
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(
            f"data factory {function!r}: pool {name!r} is {type(rows).__name__}; a list of "
            "mappings is expected, one a row"
        )
    if not rows:
        raise UserError(f"data factory {function!r}: pool {name!r} holds no rows")
    return datasets.Dataset.from_list([dict(row) for row in rows])


def _content(table: Any) -> str:
    """Digest over all rows: a function may return other ones tomorrow."""
    return digest_json(table.to_list())
