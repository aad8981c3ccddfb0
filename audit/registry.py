"""The tracking store as a source of models: what ``models:/…`` and ``runs:/…`` name."""

from __future__ import annotations

import tempfile
from pathlib import Path

from audit.environment import without_credentials
from audit.store import Store
from halfstep.errors import UserError


def fetch(store: Store, address: str) -> Path:
    """A local copy of what an address names; artifacts of the embedded store where they lie.

    Raises:
        UserError: there is nothing at that address, or the store does not answer.
    """
    from audit.trail import connect, mlflow_download

    connect(store)
    folder = tempfile.mkdtemp(prefix="halfstep-model-")
    try:
        return Path(mlflow_download(store, address, folder))
    except Exception as error:  # MLflow's own types, its HTTP client's and the OS's
        first = without_credentials((str(error) or type(error).__name__).splitlines()[0])
        raise UserError(f"{address} cannot be fetched from {store.shown_uri}: {first}") from error
