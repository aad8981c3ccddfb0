"""The store: records, caches and the embedded tracking database; one writer at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from audit.environment import without_credentials
from halfstep.errors import UserError

SWEEP_ID = 12
"""Digits of its key that a sweep is known by."""
LEAST_FREE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class SweepFolder:
    """Where one sweep's records lie: ``<kind>/<start of the key>``."""

    path: Path

    @property
    def sweep_id(self) -> str:
        return self.path.name

    @property
    def store(self) -> Path:
        """The folder of the store that it lies in."""
        return self.path.parent.parent

    @property
    def fresh_mark(self) -> Path:
        """Present where nothing of earlier sweeps may be reused."""
        return self.path / ".fresh"

    @property
    def result(self) -> Path:
        """What a finished sweep came to; its presence says that it finished."""
        return self.path / "sweep.json"

    def place(self, kind: str, key: str) -> Path:
        """The folder of a record."""
        return self.path / kind / key[:16]

    def earlier(self, kind: str, key: str) -> Path | None:
        """The same work in another sweep of this store."""
        if self.fresh_mark.exists():
            return None
        found = self.path.parent.glob(f"*/{kind}/{key[:16]}/record.json")
        return next((p.parent for p in sorted(found) if self.path not in p.parents), None)


@dataclass(frozen=True)
class Store:
    """A folder (``mlruns`` by default)."""

    path: Path
    apart: bool = False
    """True for a scratch store: embedded, whatever ``MLFLOW_TRACKING_URI`` says."""

    @property
    def tracking_uri(self) -> str:
        """``MLFLOW_TRACKING_URI``, or the embedded SQLite database."""
        if self.embedded:
            return f"sqlite:///{self.database}"
        return os.environ["MLFLOW_TRACKING_URI"]

    @property
    def embedded(self) -> bool:
        return self.apart or not os.environ.get("MLFLOW_TRACKING_URI")

    @property
    def shown_uri(self) -> str:
        """The tracking address without credentials, for people."""
        return without_credentials(self.tracking_uri)

    @property
    def database(self) -> Path:
        return self.path.absolute() / "mlflow.db"

    @property
    def witness(self) -> Path:
        """What was entered in the ledger from here."""
        return self.path / "ledger.jsonl"

    @property
    def artifacts(self) -> Path:
        return self.path.absolute() / "artifacts"

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    def writer(self) -> str:
        """A name for whoever writes from this store, to tell it from other machines."""
        place = self.path / ".writer"
        if not place.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            place.write_text(uuid.uuid4().hex)
        return place.read_text()

    def sweep(self, key: str, fresh: bool, taken: int = 0) -> SweepFolder:
        """The folder of the newest sweep with this key, or of a new one.

        ``taken``: the highest number that is in use elsewhere.
        """
        stem = key[:SWEEP_ID]
        numbers = [int(p.name.rsplit("-", 1)[1]) for p in self.spool.glob(f"{stem}-*")]
        numbers += [taken] if taken else []
        number = max(numbers, default=0 if fresh else 1) + (1 if fresh else 0)
        folder = SweepFolder(self.spool / f"{stem}-{number}")
        if fresh:
            folder.path.mkdir(parents=True)
            folder.fresh_mark.touch()
        return folder

    def check_writable(self) -> None:
        """Raises UserError where the store could not be written; writes nothing."""
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UserError(f"store {self.path}: {place} is a file, not a folder")
        try:
            tempfile.TemporaryFile(dir=place).close()  # permissions alone do not tell it all
        except OSError as error:
            raise UserError(
                f"store {self.path} cannot be written ({error.strerror}); name another with "
                "--store FOLDER"
            ) from error
        free = shutil.disk_usage(place).free
        if free < LEAST_FREE_BYTES:
            raise UserError(
                f"store {self.path}: {free // 2**20} MiB free on its disk, a sweep needs at least "
                f"{LEAST_FREE_BYTES // 2**20} MiB"
            )

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Holds the store for one sweep.

        Raises:
            UserError: another process holds it; says which.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        holder = self.path / ".lock-holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"store {self.path} is in use by {_holder(holder)}; wait for it to end, or name "
                "another store with --store FOLDER"
            ) from None
        try:
            held = {"pid": os.getpid(), "what": what, "since": time.strftime("%H:%M:%S")}
            holder.write_text(json.dumps(held))
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"{held['what']} (process {held['pid']}, since {held['since']})"
    except (OSError, ValueError, KeyError):
        return "another process"
