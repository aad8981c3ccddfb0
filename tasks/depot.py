"""The depot: what workers share, by the digest of its content.

Everything large that a worker needs lies here, at a folder or a bucket that all of them reach;
tasks carry digests. A worker process reads each piece once. What is read is checked against its
digest before anything is made of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import fs
from torch import Tensor

from audit import spool
from audit.environment import without_credentials
from audit.outage import patience
from audit.spool import Record
from halfstep.digest import digest_bytes, digest_file
from halfstep.errors import UserError
from halfstep.examples import Column, Held, Stored

DEPOT = "depot"
"""The folder of a store that is its own depot."""
CACHE_VARIABLE = "HALFSTEP_CACHE"
PASSES = re.compile(
    "NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT"
    r"|HTTP status (5\d\d|429)"
)
"""What Arrow says of a bucket that is away or overloaded, after trying for six seconds."""
PAUSE, LONGEST_PAUSE = 0.5, 10.0
LARGE = 64 * 1024
"""Tensors of at least so many bytes are pieces of their own, which values may share."""


@dataclass
class Traffic:
    """What this process moved."""

    bytes_read: int = 0
    pieces_read: int = 0
    bytes_written: int = 0


class Depot:
    """Pieces at ``address``: a folder, or an address that Arrow's file systems know (``s3://…``).

    Where the depot is no local folder, pieces are kept in a cache on this machine.
    """

    def __init__(self, address: str, say: Callable[[str], None] = lambda told: None) -> None:
        """
        Args:
            say: is told where the depot does not answer and is waited for.
        """
        self.address = address
        self._say = say
        self.traffic = Traffic()
        self._unpacked: dict[str, Any] = {}
        self._read: dict[str, Path | bytes] = {}
        self._local = "://" not in address
        self._waits = not self._local
        try:
            if self._local:
                self._files, self._root = fs.LocalFileSystem(), str(Path(address).absolute())
            else:
                self._files, self._root = fs.FileSystem.from_uri(address)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises UserError where the depot cannot be written and read back, at once."""
        data = uuid.uuid4().bytes
        name = f"check/{uuid.uuid4().hex}"
        waits, self._waits = self._waits, False
        try:
            self.write(name, data)
            if self.read(name) != data:
                raise UserError(f"depot {self.shown}: what was written does not come back")
            self.remove(name)
        finally:
            self._waits = waits

    @property
    def shown(self) -> str:
        return without_credentials(self.address)

    # Pieces, by their digest.

    def put(self, data: bytes) -> str:
        """Keeps a piece, unless it is there; returns its digest."""
        digest = digest_bytes(data)
        name = _place(digest)
        if not self._there(name):
            self.write(name, data)
        return digest

    def get(self, digest: str) -> bytes:
        """A piece.

        Raises:
            UserError: it is not there, or not what its digest says.
        """
        found = self._file(digest)
        return found.read_bytes() if isinstance(found, Path) else found

    def _file(self, digest: str) -> Path | bytes:
        """A piece as a local file, read and checked once a process."""
        if digest not in self._read:
            local = Path(self._root, _place(digest)) if self._local else _cached(digest)
            if local is not None and local.is_file() and digest_file(local) == digest:
                size = local.stat().st_size
            else:
                data = self.read(_place(digest))
                if data is None:
                    raise UserError(f"depot {self.shown} has lost piece {digest[:16]}")
                if digest_bytes(data) != digest:
                    raise UserError(
                        f"depot {self.shown}: piece {digest[:16]} is not what was written; remove "
                        "the depot and run the sweep again"
                    )
                size = len(data)
                local = _keep(digest, data)
            self.traffic.bytes_read += size
            self.traffic.pieces_read += 1
            self._read[digest] = local
        return self._read[digest]

    # Values, as pieces that name their large tensors by digest.

    def pack(self, value: object, shared: Mapping[int, tuple[str, str]] | None = None) -> str:
        """Keeps a value; returns its digest.

        Args:
            shared: by ``id``, objects that are attributes of a value packed before: its digest,
                and the attribute's name.

        Raises:
            UserError: it holds something that cannot be sent to another process.
        """
        out = io.BytesIO()
        try:
            _Pickler(out, self, shared or {}).dump(value)
        except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"the subject cannot be sent to workers ({first}); run the sweep without --runner"
            ) from error
        return self.put(out.getvalue())

    def unpack(self, digest: str) -> Any:
        """The value, made once a process.

        Unpickling runs code; the digest came with the task, from whoever may run code here anyway.
        """
        if digest not in self._unpacked:
            self._unpacked[digest] = _Unpickler(io.BytesIO(self.get(digest)), self).load()
        return self._unpacked[digest]

    # Finished work, by its key.

    def keep_record(self, key: str, folder: Path) -> Record:
        """Keeps the record of a folder under its key."""
        record = spool.read(folder)
        assert record is not None
        for name in record.files:
            self.put((folder / spool.FILES / name).read_bytes())
        self.write(f"records/{key}", spool.as_json(record))
        return record

    def record(self, key: str) -> Record | None:
        """The record that a worker kept, or None."""
        data = self.read(f"records/{key}")
        return Record(**json.loads(data)) if data is not None else None

    def fetch_record(self, key: str, folder: Path) -> Record | None:
        """Commits a record that a worker kept to a folder of the spool."""
        record = self.record(key)
        if record is None:
            return None
        return spool.commit(folder, record, {n: self.get(d) for n, d in record.files.items()})

    def keep_digest(self, key: str, digest: str) -> None:
        """Notes which value some work came to."""
        self.write(f"made/{key}", digest.encode())

    def made(self, key: str) -> str | None:
        """The digest of the value that some work came to, if it was done."""
        data = self.read(f"made/{key}")
        return data.decode() if data is not None else None

    def unpack_made(self, key: str) -> Any:
        """The value that some work came to.

        Raises:
            UserError: it is not there.
        """
        digest = self.made(key)
        if digest is None:
            raise UserError(f"depot {self.shown} has lost what {key[:16]} came to")
        return self.unpack(digest)

    # Files.

    def _there(self, name: str) -> bool:
        return bool(self._call(lambda: self._files.get_file_info(f"{self._root}/{name}")).is_file)

    def names(self, folder: str) -> list[str]:
        """What lies in a folder of the depot."""
        wanted = fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        found = self._call(lambda: self._files.get_file_info(wanted))
        return [info.base_name for info in found if info.is_file and info.base_name[0] != "."]

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        if self._there(name):
            with contextlib.suppress(FileNotFoundError):
                self._call(lambda: self._files.delete_file(f"{self._root}/{name}"))

    def read(self, name: str) -> bytes | None:
        """A file of the depot, or None."""

        def read() -> bytes | None:
            try:
                with self._files.open_input_stream(f"{self._root}/{name}") as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._call(read)

    def write(self, name: str, data: bytes) -> None:
        """Whole or not at all: an object store shows what is complete, a folder what is renamed."""
        self.traffic.bytes_written += len(data)
        path = f"{self._root}/{name}"
        if self._local:
            _write_whole(Path(path), data)
            return

        def write() -> None:
            with self._files.open_output_stream(path) as stream:
                stream.write(data)

        self._call(write)

    def _call(self, act: Callable[[], Any]) -> Any:
        """Does something with the files; a bucket that is away is waited for, as long as
        `audit.outage.patience` says.

        Raises:
            UserError: it stays away, or refuses.
        """
        deadline, pause, told = time.monotonic() + patience(), PAUSE, False
        while True:
            try:
                return act()
            except (pa.ArrowException, OSError) as error:
                if self._local:
                    raise
                left = deadline - time.monotonic() if self._waits else 0.0
                if left <= 0 or not PASSES.search(str(error)):
                    raise self._failed(error) from error
                if not told:
                    self._say(f"{self._failed(error)}; waiting for it up to {left:.0f} s")
                    told = True
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)

    def _failed(self, error: Exception) -> UserError:
        first = without_credentials((str(error) or type(error).__name__).splitlines()[0])
        return UserError(f"depot {self.shown} cannot be used: {first}")


class _Pickler(pickle.Pickler):
    """Large tensors become pieces; examples in files become the rows that are needed."""

    def __init__(
        self, out: io.BytesIO, depot: Depot, shared: Mapping[int, tuple[str, str]]
    ) -> None:
        super().__init__(out, protocol=5)
        self._depot = depot
        self._shared = shared

    def persistent_id(self, value: object) -> object:
        if id(value) in self._shared:
            return ("attribute", *self._shared[id(value)])
        if type(value) is Tensor and value.nbytes >= LARGE and value.layout == torch.strided:
            return ("tensor", *self._tensor(value))
        return None

    def reducer_override(self, value: object) -> Any:
        if type(value) is Tensor and value.layout == torch.strided:
            return _tensor, (_raw(value), str(value.dtype), tuple(value.shape))
        if isinstance(value, Column) and isinstance(value.values, Stored):
            return Column, (_taken(value), *_offsets(value))
        return NotImplemented

    def _tensor(self, value: Tensor) -> tuple[str, str, tuple[int, ...]]:
        return self._depot.put(_raw(value)), str(value.dtype), tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, depot: Depot) -> None:
        super().__init__(source)
        self._depot = depot

    def persistent_load(self, named: Any) -> object:
        kind, digest, *rest = named
        if kind == "attribute":
            return getattr(self._depot.unpack(digest), rest[0])
        return _tensor(self._depot.get(digest), *rest)


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensor(data: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    kind = getattr(torch, dtype.removeprefix("torch."))
    if not data:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)


def _taken(column: Column) -> Held:
    """The elements of a column's rows, in memory."""
    rows = [column.row(i) for i in range(len(column))]
    return Held(torch.cat(rows) if column.offsets is not None else torch.stack(rows))


def _offsets(column: Column) -> tuple[np.ndarray | None, None]:
    if column.offsets is None:
        return None, None
    return np.concatenate([[0], np.cumsum(column.lengths)]), None


def _place(digest: str) -> str:
    return f"pieces/{digest[:2]}/{digest}"


def _cached(digest: str) -> Path:
    """Where this machine keeps a piece of a depot elsewhere."""
    named = os.environ.get(CACHE_VARIABLE)
    root = Path(named) if named else Path(tempfile.gettempdir(), f"halfstep-{os.getuid()}")
    return root / _place(digest)


def _keep(digest: str, data: bytes) -> Path | bytes:
    """In the cache; in memory where that cannot be written."""
    place = _cached(digest)
    try:
        _write_whole(place, data)
    except OSError:
        return data
    return place


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
