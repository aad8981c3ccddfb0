"""Registered variants in MLflow: model versions that hold safetensors and a scheme, and aliases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit.evidence import PREFIX

MODEL_TYPE = "halfstep-variant"


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    version: str
    model_id: str
    source: str
    """Where its files lie, as MLflow shows it."""

    @property
    def key(self) -> str:
        """Its name in the ledger's settings."""
        return f"{self.name}/{self.version}"


def register(
    client: MlflowClient,
    embedded: bool,
    experiment_id: str,
    run_id: str,
    name: str,
    record: str,
    folder: Path,
    tags: Mapping[str, str],
    description: str,
) -> Version:
    """The version that holds a record's files: made if it is not there, complete in either case.

    Args:
        name: the registered model's.
        record: the tag by which it is found again.
        folder: what it holds.
    """
    marked = f"tags.`{PREFIX}record` = '{record}'"
    models = client.search_logged_models([experiment_id], marked)
    model = models[0] if models else client.create_logged_model(
        experiment_id, name, run_id, {PREFIX + "record": record}, model_type=MODEL_TYPE
    )  # fmt: skip
    client.log_model_artifacts(model.model_id, str(folder))
    if model.status != LoggedModelStatus.READY:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    found = client.search_model_versions(f"name = '{_quoted(name)}'")
    version = next((v for v in found if v.tags.get(PREFIX + "record") == record), None)
    if version is None:
        version = client.create_model_version(
            name,
            # A client of a database resolves `models:/` against whatever store is the global one.
            model.artifact_location if embedded else f"models:/{model.model_id}",
            run_id,
            {PREFIX + "record": record, **{PREFIX + k: v for k, v in tags.items()}},
            description=description,
            model_id=model.model_id,
        )
    return Version(name, str(version.version), model.model_id, version.source)


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Versions by alias; nothing where no such model is registered."""
    try:
        found = client.get_registered_model(name).aliases
    except MlflowException:
        return {}
    return {alias: str(version) for alias, version in found.items()}


def set_aliases(client: MlflowClient, name: str, wanted: Mapping[str, str | None]) -> None:
    """Points aliases to versions; None takes one away."""
    now = aliases(client, name)
    for alias, version in wanted.items():
        if version is None and alias in now:
            client.delete_registered_model_alias(name, alias)
        elif version is not None and now.get(alias) != version:
            client.set_registered_model_alias(name, alias, version)


def _quoted(name: str) -> str:
    return name.replace("'", "''")
