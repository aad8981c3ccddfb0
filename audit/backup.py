"""A backup of an embedded store: a copy that is consistent while others read, and verifies."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from audit.store import Store
from halfstep.errors import UserError

CAN_BE_MADE_AGAIN = ("cache", "depot")
"""Folders of a store that a backup leaves out."""


def backup(store: Store, folder: Path) -> dict[str, Any]:
    """Copies a store to a new folder and verifies the copy. The caller holds the store.

    To restore, use the copy as the store: no file of it holds a path.

    Raises:
        UserError: the store is on a server, or the folder is there already.
    """
    from audit.reading import TrackingStore
    from audit.verify import verify

    if not store.embedded:
        raise UserError(
            f"the store is on {store.shown_uri}: back up its database (pg_dump) and its bucket "
            "there; docs/operate.md says how"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"backup: {folder} is there already; name a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # The database first: what is added to the artifacts meanwhile, nothing in the copy names.
    with (
        closing(sqlite3.connect(store.database)) as source,
        closing(sqlite3.connect(partial / store.database.name)) as copy,
    ):
        source.backup(copy)
    left = {*CAN_BE_MADE_AGAIN, store.database.name, f"{store.database.name}-wal",
            f"{store.database.name}-shm", ".lock", ".lock-holder", ".writer"}  # fmt: skip
    for one in store.path.iterdir():
        if one.name in left or one.resolve() == partial.resolve():
            continue
        if one.is_dir():
            shutil.copytree(one, partial / one.name)
        else:
            shutil.copy2(one, partial / one.name)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    report = verify(TrackingStore(Store(folder, apart=True)))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return {"folder": str(folder), "bytes": size, **report.to_json()}
