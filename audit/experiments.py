"""Experiments of the tracking store: found, or made with a location that fits the store."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit import artifacts
from audit.evidence import DELETED
from audit.store import Store
from halfstep.errors import UserError

TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Shows runs, params and metrics; MLflow's other kind is for traces of language models."""


def open_experiment(client: MlflowClient, store: Store, name: str, tags: Mapping[str, str]) -> str:
    """The id of an experiment, which is made with these tags where it is not there.

    Raises:
        UserError: it is deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        location = artifacts.location(name) if store.embedded else None
        try:
            return str(client.create_experiment(name, location, {**TRAINING, **tags}))
        except MlflowException:  # made by another process in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == DELETED:
        raise UserError(
            f"MLflow experiment {name!r} is deleted; restore it (mlflow experiments restore -x "
            f"{found.experiment_id}) or, if it is a config's, give that another name"
        )
    return str(found.experiment_id)
