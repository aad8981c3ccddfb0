"""What transforms have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sources.prepared import Row

Chunk = Mapping[str, Sequence[Any]]
"""Some rows of a table, column by column."""
Target = Callable[[Any], np.ndarray]
"""From a cell of the target column to what the evaluator gets; raises ValueError."""


class Table(Protocol):
    """What `datasets.Dataset` offers, as far as we need it."""

    @property
    def column_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Chunk: ...


CHUNK = 256
"""Rows that are read and transformed at once: bounds the memory, whatever the table's length."""


def numbered(table: Table) -> Iterator[tuple[int, Chunk]]:
    """Chunks with the number of their first row."""
    for start in range(0, len(table), CHUNK):
        yield start, table[start : start + CHUNK]


def chunks(table: Table) -> Iterator[Chunk]:
    for _, chunk in numbered(table):
        yield chunk


Made = Iterable[tuple[int, Row | str]]
"""Row number in the chunk, and the example it makes, or why it makes none."""
