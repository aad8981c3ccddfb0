"""The spool: records committed to disk, whole or not at all, before anything else sees them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from audit.termination import finishing
from halfstep.digest import digest_bytes

RECORD = "record.json"
FILES = "files"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Record:
    """One finished piece of work: what MLflow will show of it, and what a resumed sweep needs."""

    kind: str
    """sweep, reference, calibration, cell or decision."""
    key: str
    """Digest of everything the work depended on: equal keys, equal work."""
    name: str
    status: str = "finished"
    """``finished`` or ``failed``."""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    """What only halfstep reads: JSON."""
    started: float = 0.0
    """Seconds since the epoch."""
    ended: float = 0.0
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file, by its name below ``files/``."""

    @property
    def identity(self) -> str:
        """What its run is found by in the trail."""
        return f"{self.kind}:{self.key}"


def commit(folder: Path, record: Record, files: Mapping[str, bytes]) -> Record:
    """Writes a record with its files to ``folder`` by one atomic rename; returns it as written.

    If the folder exists already (another process did the same work) that one stays.
    """
    record = replace(
        record,
        # Whatever somebody does to the clock, nothing ends before it starts.
        ended=max(record.ended or time.time(), record.started),
        files={name: digest_bytes(data) for name, data in sorted(files.items())},
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f"{_UNFINISHED}{os.getpid()}-{folder.name}"
    shutil.rmtree(staging, ignore_errors=True)
    with finishing():
        try:
            for name, data in files.items():
                _write(staging / FILES / name, data)
            _write(staging / RECORD, as_json(record))
            staging.rename(folder)
        except OSError:
            shutil.rmtree(staging, ignore_errors=True)
            if not (folder / RECORD).is_file():
                raise
    return record


def as_json(record: Record) -> bytes:
    return json.dumps(asdict(record), indent=1).encode()


def read(folder: Path) -> Record | None:
    """The record in a folder, or None where there is none or a file of it was damaged."""
    try:
        record = Record(**json.loads((folder / RECORD).read_text()))
        intact = all(
            digest_bytes((folder / FILES / name).read_bytes()) == digest
            for name, digest in record.files.items()
        )
    except (OSError, ValueError, TypeError):
        return None
    return record if intact else None


def copy(earlier: Path, folder: Path) -> Record | None:
    """Takes over a record of another sweep, tagged with where it came from."""
    record = read(earlier)
    if record is None:
        return None
    files = {name: (earlier / FILES / name).read_bytes() for name in record.files}
    origin = record.tags.get("reused_from", earlier.parent.parent.name)
    return commit(folder, replace(record, tags=record.tags | {"reused_from": origin}), files)


def recall(folder: Path) -> Record | None:
    """The record in a folder, or None with the folder free for a new one."""
    record = read(folder)
    if record is None:
        discard_damaged(folder)
    return record


def discard_damaged(folder: Path) -> None:
    """Moves a folder that `read` refused out of the way, so that the work can be done anew."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))


def sweep_unfinished(root: Path) -> None:
    """Removes what killed processes left half-written."""
    for leftover in root.rglob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def keep(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    staging = path.with_suffix(f".{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(staging, data)
    staging.replace(path)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
