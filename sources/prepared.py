"""Prepared examples on disk: written once a row at a time, read back a batch at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from halfstep.errors import UserError
from halfstep.examples import Column, Examples, Inputs, Stored

META = "examples.json"


@dataclass(frozen=True)
class Row:
    """One example as a transform makes it."""

    inputs: Sequence[Mapping[str, np.ndarray]]
    """What the model takes, by argument: one row, or several (the two sentences of a pair)."""
    target: np.ndarray
    columns: Mapping[str, object] = field(default_factory=dict)
    """What slices and clusters go by."""


@dataclass
class _File:
    """Rows of one column, one after the other; their lengths, should these differ."""

    path: Path
    handle: IO[bytes]
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()
    lengths: list[int] = field(default_factory=list)
    scalar: bool = False

    def add(self, value: np.ndarray) -> None:
        value = np.asarray(value, order="C")
        whole = value.reshape(1) if value.ndim == 0 else value
        if self.dtype is None:
            self.dtype, self.shape, self.scalar = value.dtype, whole.shape[1:], value.ndim == 0
        if value.dtype != self.dtype or whole.shape[1:] != self.shape:
            raise UserError(
                f"example {len(self.lengths)}: {self.path.stem} is {value.dtype} "
                f"{list(value.shape)} where those before are {self.dtype} "
                f"{[None, *self.shape]}; bring them to one shape (images: give a size)"
            )
        self.lengths.append(len(whole))
        self.handle.write(whole.tobytes())

    def described(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype), "shape": list(self.shape), "scalar": self.scalar}


class Writer:
    """Takes examples one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, _File] = {}
        self._names: list[str] | None = None
        self._each = 0
        self._targets = self._open("target")
        self._columns: dict[str, list[Any]] = {}
        self.unusable: list[str] = []
        self.told: dict[str, int] = {}
        """What a reader must know: how often it happened, by what it was."""
        self.shared = 0
        """How many rows at the end belong to no example but to all."""

    def add(self, row: Row) -> None:
        self._each = self._each or len(row.inputs)
        for inputs in row.inputs:
            self._row(inputs)
        self._targets.add(row.target)
        for name, value in row.columns.items():
            self._columns.setdefault(name, []).append(value)

    def share(self, inputs: Mapping[str, np.ndarray]) -> None:
        """A row that all examples need; after the last example."""
        self._row(inputs)
        self.shared += 1

    def _row(self, inputs: Mapping[str, np.ndarray]) -> None:
        if self._names is None:
            self._names = list(inputs)
        for name in self._names:
            if name not in self._files:
                self._files[name] = self._open(f"input-{len(self._files)}")
            self._files[name].add(inputs[name])

    def _open(self, stem: str) -> _File:
        path = self._folder / f"{stem}.bin"
        return _File(path, path.open("wb"))

    def finish(self) -> None:
        """Writes what `read` needs beside the values."""
        for file in (self._targets, *self._files.values()):
            file.handle.close()
            np.save(file.path.with_suffix(".npy"), np.array(file.lengths, dtype=np.int64))
        described = {
            "inputs": [
                {"name": name, "file": file.path.name, **file.described()}
                for name, file in self._files.items()
            ],
            "target": {"file": self._targets.path.name, **self._targets.described()},
            "examples": len(self._targets.lengths),
            "rows_each": self._each,
            "shared": self.shared,
            "columns": self._columns,
            "unusable": self.unusable,
            "told": {what: count for what, count in self.told.items() if count},
        }
        (self._folder / META).write_text(json.dumps(described))


def read(folder: Path) -> Examples:
    """The examples of a folder; their values stay on disk until a batch asks for them."""
    meta = json.loads((folder / META).read_text())
    count, each, shared = meta["examples"], meta["rows_each"], meta["shared"]
    if count == 0:
        reason = f": {meta['unusable'][0]}" if meta["unusable"] else ""
        raise UserError(f"no example could be read{reason}")
    inputs = Inputs({d["name"]: _column(folder, d) for d in meta["inputs"]})
    members = None
    if each != 1 or shared:
        members = np.arange(count * each).reshape(count, each)
    return Examples(
        inputs,
        _column(folder, meta["target"]),
        members,
        np.arange(count * each, count * each + shared),
        {name: np.array(values) for name, values in meta["columns"].items()},
        tuple(meta["unusable"]),
        meta["told"],
    )


def _column(folder: Path, described: Mapping[str, Any]) -> Column:
    path = folder / described["file"]
    lengths = np.load(path.with_suffix(".npy"))
    dtype = torch.from_numpy(np.empty(0, dtype=described["dtype"])).dtype
    shape, total = described["shape"], int(lengths.sum())
    if described["scalar"]:
        return Column(Stored(path, dtype, torch.Size((total,))))
    if len(lengths) and (lengths == lengths[0]).all():
        return Column(Stored(path, dtype, torch.Size((len(lengths), int(lengths[0]), *shape))))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Column(Stored(path, dtype, torch.Size((total, *shape))), offsets)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes ``folder`` whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():  # another process was first
            return
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
