"""The tracking store as a source of models: what ``models:/…`` and ``runs:/…`` name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from audit.environment import without_credentials
from audit.store import Store
from halfstep.errors import UserError, first_line


@contextmanager
def fetch(store: Store, address: str) -> Iterator[Path]:
    """A local copy of what an address names, there while the context is open.

    Raises:
        UserError: there is nothing at that address, or the store does not answer.
    """
    from audit.trail import connect

    if store.embedded and not store.database.exists():
        raise UserError(
            f"{address}: store {store.path} holds no model yet; set MLFLOW_TRACKING_URI to the "
            "store that does"
        )
    connect(store)
    with tempfile.TemporaryDirectory(prefix="halfstep-model-") as folder:
        yield _downloaded(store, address, folder)


def _downloaded(store: Store, address: str, folder: str) -> Path:
    from audit.trail import mlflow_download

    try:
        return Path(mlflow_download(store, address, folder))
    except Exception as error:  # MLflow's own types, its HTTP client's and the OS's
        first = without_credentials(first_line(error))
        raise UserError(f"{address} cannot be fetched from {store.shown_uri}: {first}") from error
