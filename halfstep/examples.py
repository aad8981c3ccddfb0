"""Examples: what a model is run on, and what its answers are compared with.

Rows may lie in memory or in a file, and may be of different lengths (texts). Batches hold rows of
one length only, so nothing is ever padded: no filler enters an observation, and no example's result
depends on which others it shares a batch with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfstep.batches import Batch
from halfstep.digest import digest_bytes, digest_json
from halfstep.errors import UserError

Index = slice | np.ndarray
POSITIONAL = ""
"""The name of a lone column that models take by position."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Elements in a file of raw values: only what is asked for is read."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size

    @cached_property
    def _file(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            os.close(self._file)

    def read(self, start: int, stop: int) -> Tensor:
        each = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        wanted = (stop - start) * each
        shape = (stop - start, *self.shape[1:])
        if wanted == 0:
            return torch.empty(shape, dtype=self.dtype)
        data = bytearray(os.pread(self._file, wanted, start * each))
        if len(data) != wanted:
            raise UserError(f"{self.path} is cut short; remove it and run the same command again")
        return torch.frombuffer(data, dtype=self.dtype).reshape(shape)


@dataclass(frozen=True, eq=False)
class Held:
    """Elements in memory."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]


Values = Stored | Held
"""Elements along a first axis."""


@dataclass(frozen=True, eq=False)
class Column:
    """Rows of one type: row i is ``values[i]``, or ``values[offsets[i]:offsets[i + 1]]``."""

    values: Values
    offsets: np.ndarray | None = None
    """int64 ``[rows + 1]`` where rows differ in length."""
    index: np.ndarray | None = None
    """int64: which rows these are, in order; None for all."""

    @staticmethod
    def of(tensor: Tensor | np.ndarray) -> Column:
        """Rows along the first axis of a tensor."""
        return Column(Held(torch.as_tensor(tensor)))

    @staticmethod
    def ragged(rows: list[Tensor]) -> Column:
        """Rows of different lengths."""
        lengths = np.array([0, *map(len, rows)], dtype=np.int64)
        return Column(Held(torch.cat(rows)), np.cumsum(lengths))

    def __len__(self) -> int:
        if self.index is not None:
            return len(self.index)
        return self.values.shape[0] if self.offsets is None else len(self.offsets) - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of one row; the axis that differs from row to row is None."""
        rest = tuple(self.values.shape[1:])
        return rest if self.offsets is None else (None, *rest)

    @property
    def lengths(self) -> np.ndarray:
        """Of rows that differ in length, int64."""
        assert self.offsets is not None
        found = np.diff(self.offsets)
        return found if self.index is None else found[self.index]

    def row(self, i: int) -> Tensor:
        i = int(i if self.index is None else self.index[i])
        if self.offsets is None:
            return self.values.read(i, i + 1)[0]
        return self.values.read(int(self.offsets[i]), int(self.offsets[i + 1]))

    def rows(self, which: Index) -> Tensor:
        """Rows stacked; those that differ in length must not."""
        if isinstance(which, slice) and self.index is None and self.offsets is None:
            start, stop, _ = which.indices(len(self))
            return self.values.read(start, stop)
        if isinstance(which, slice):
            which = np.arange(*which.indices(len(self)))
        if isinstance(self.values, Held) and self.offsets is None:
            at = which if self.index is None else self.index[which]
            return self.values.tensor[torch.from_numpy(at)]
        return torch.stack([self.row(int(i)) for i in which])

    def all(self) -> Tensor:
        return self.rows(slice(None))

    def take(self, which: np.ndarray) -> Column:
        """Some rows, in that order. What is in memory is copied, so that the rest can be freed."""
        at = which if self.index is None else self.index[which]
        if isinstance(self.values, Held) and self.offsets is None:
            return Column(Held(self.values.tensor[torch.from_numpy(at)]))
        return Column(self.values, self.offsets, at)

    def digest_of(self, i: int) -> bytes:
        row = self.row(i).contiguous()
        sha = hashlib.sha256(f"{row.dtype}|{tuple(row.shape)}|".encode())
        sha.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.digest()

    @cached_property
    def digest(self) -> str:
        """Over all rows, in order."""
        return digest_bytes(b"".join(self.digest_of(i) for i in range(len(self))))


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the model takes: one column passed by position, or several by name."""

    columns: Mapping[str, Column]

    @staticmethod
    def of(tensor: Tensor) -> Inputs:
        """A tensor passed by position, one example a row."""
        return Inputs({POSITIONAL: Column.of(tensor)})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, which: np.ndarray) -> Inputs:
        return Inputs({name: column.take(which) for name, column in self.columns.items()})

    def batch(self, which: Index) -> Batch:
        found = {name: column.rows(which) for name, column in self.columns.items()}
        return found[POSITIONAL] if list(found) == [POSITIONAL] else found

    @property
    def tensor(self) -> Tensor:
        """All of a lone column passed by position."""
        batch = self.batch(slice(None))
        assert isinstance(batch, Tensor)
        return batch

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """int64 ``[rows, ragged columns]``; None where all rows are alike."""
        ragged = [c.lengths for c in self.columns.values() if c.offsets is not None]
        return np.stack(ragged, axis=1) if ragged else None

    def batches(self, size: int) -> Iterator[tuple[Index, Batch]]:
        """Every row once, with its index; rows of equal lengths together, shortest first."""
        for which in self._chunks(size):
            yield which, self.batch(which)

    def _chunks(self, size: int) -> Iterator[Index]:
        if self.lengths is None:
            for start in range(0, len(self), size):
                yield slice(start, min(start + size, len(self)))
            return
        order = np.lexsort(self.lengths.T)
        ordered = self.lengths[order]
        ends = np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1
        for group in np.split(order, ends):
            for start in range(0, len(group), size):
                yield np.sort(group[start : start + size])

    def sample(self, count: int) -> Batch:
        """Up to ``count`` rows as one batch: the first ones of the commonest length."""
        if self.lengths is None:
            return self.batch(slice(0, min(count, len(self))))
        _, which, counts = np.unique(self.lengths, axis=0, return_inverse=True, return_counts=True)
        longest = int(np.flatnonzero(counts == counts.max())[-1])
        return self.batch(np.flatnonzero(which.reshape(-1) == longest)[:count])

    @property
    def shape(self) -> dict[str, list[int | None]]:
        """Shape of a row of each column."""
        return {name: list(column.shape) for name, column in self.columns.items()}

    def described(self) -> str:
        """For people: types and shapes."""
        told = [
            f"{name or 'one tensor'} {str(c.dtype).removeprefix('torch.')} "
            f"[n{''.join(', ' + ('length' if s is None else str(s)) for s in c.shape)}]"
            for name, c in self.columns.items()
        ]
        return ", ".join(told)

    @cached_property
    def digests(self) -> np.ndarray:
        """SHA-256 of each row, ``S64`` ``[rows]``: equal rows are the same input, wherever they
        stand."""
        names = sorted(self.columns)
        found = np.empty(len(self), dtype="S64")
        for i in range(len(self)):
            parts = b"".join(name.encode() + self.columns[name].digest_of(i) for name in names)
            found[i] = digest_bytes(parts).encode()
        return found


@dataclass(frozen=True, eq=False)
class Examples:
    """What is evaluated: examples, each of one row of inputs or of several, with its target.

    In most tasks example i is row i. An example may have several rows of its own (the two sentences
    of a pair), and all may need some rows in common (the documents that queries search).
    """

    inputs: Inputs
    targets: Column
    """What the evaluator compares with, one an example."""
    members: np.ndarray | None = None
    """int64 ``[examples, k]``: each example's rows; None where example i is row i."""
    shared: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Rows that every example needs."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What slices and clusters go by, one an example."""
    unusable: tuple[str, ...] = ()
    """What could not be read as an example, each with the reason."""
    told: Mapping[str, int] = field(default_factory=dict)
    """What a reader must know of how they were made: how often it happened, by what it was."""

    def __post_init__(self) -> None:
        count = len(self.inputs) if self.members is None else len(self.members)
        if count != len(self.targets):
            raise UserError(f"{count} inputs but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, which: np.ndarray | Tensor) -> Examples:
        """Some examples, in that order, with the rows that they need."""
        which = np.asarray(which, dtype=np.int64)
        targets = self.targets.take(which)
        columns = {name: values[which] for name, values in self.columns.items()}
        if self.members is None:
            taken = self.inputs.take(which)
            return replace(self, inputs=taken, targets=targets, columns=columns)
        members = self.members[which]
        used, place = np.unique(np.concatenate([members.ravel(), self.shared]), return_inverse=True)
        own, shared = np.split(place.reshape(-1), [members.size])
        return replace(
            self,
            inputs=self.inputs.take(used),
            targets=targets,
            members=own.reshape(members.shape),
            shared=shared,
            columns=columns,
        )

    @cached_property
    def digests(self) -> np.ndarray:
        """SHA-256 of what each example shows to the model, without what all share."""
        if self.members is None:
            return self.inputs.digests
        rows = self.inputs.digests
        joined = [b"".join(rows[own].tolist()) for own in self.members]
        return np.array([digest_bytes(one).encode() for one in joined], dtype="S64")

    @cached_property
    def digest(self) -> str:
        """Over every byte of inputs, targets and columns, in order."""
        rows = self.inputs.digests
        columns = {
            name: digest_bytes("\0".join(map(str, values.tolist())).encode())
            for name, values in self.columns.items()
        }
        return digest_json(
            {
                "examples": digest_bytes(self.digests.tobytes()),
                "shared": digest_bytes(rows[self.shared].tobytes()),
                "targets": self.targets.digest,
                "columns": columns,
            }
        )
