"""Artifacts of an embedded store by addresses that hold no folder of this machine.

MLflow writes absolute paths into its database, so that a store which is moved, or looked at from
another machine, lists nothing, and home folders stand in the audit trail. Addresses of the form
``halfstep:/<experiment>/<run>/artifacts`` are resolved against ``artifacts/`` beside the database
instead, by MLflow's own means for other stores of artifacts (the entry point
``mlflow.artifact_repository``), so its clients and its UI follow them too (ADR 19).
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

SCHEME = "halfstep"
DATABASE = "sqlite:///"
SERVER_STORE = "_MLFLOW_SERVER_FILE_STORE"
"""Where a server of MLflow's finds its database (`mlflow.server.constants`, which cannot be
imported while MLflow loads this module)."""


def location(experiment: str) -> str:
    """Where an experiment's artifacts go."""
    return f"{SCHEME}:/{quote(experiment)}"


def folder_of(address: str, artifacts: Path) -> Path:
    """The folder below ``artifacts`` that an address names.

    Raises:
        ValueError: the address is of another scheme, or leads out of the folder.
    """
    parts = urlsplit(address)
    path = (artifacts / unquote(parts.path).lstrip("/")).resolve()
    if parts.scheme != SCHEME or not path.is_relative_to(artifacts.resolve()):
        raise ValueError(f"{address} names no folder of an embedded store")
    return path


class StoreArtifacts(LocalArtifactRepository):  # type: ignore[misc]
    """The folder of a run, or of a model, in the store whose database is asked."""

    def __init__(
        self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> None:
        folder = folder_of(artifact_uri, _artifacts(tracking_uri))
        super().__init__(folder.as_uri(), tracking_uri, registry_uri)


def _artifacts(tracking_uri: str | None) -> Path:
    """Beside the database: the client's, or that of the server this runs in."""
    import mlflow

    known = (tracking_uri, os.environ.get(SERVER_STORE), mlflow.get_tracking_uri())
    for uri in known:
        if uri and uri.startswith(DATABASE):
            return Path(uri.removeprefix(DATABASE)).parent / "artifacts"
    raise ValueError("addresses of an embedded store are known to clients of its database only")
