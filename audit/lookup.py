"""Looking things up in the trail: what `halfstep list` and `halfstep show` read."""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from audit.environment import without_credentials
from audit.outage import first_words
from audit.store import Store
from audit.trail import NOTE, PREFIX, connect, search_all, stored
from halfstep.errors import UserError

RESULT = "sweep.json"
SWEEP_NAME = re.compile(r"[0-9a-f]{1,12}(-[0-9]*)?")
RUN_NAME = re.compile(r"[0-9a-f]{4,31}")
"""The start of a run's id; a whole one is asked for at once."""
NO_ANSWER = re.compile(r"Connection refused|timed out|Name or service not known|No route to host|"
                       r"Temporary failure in name resolution|Network is unreachable")  # fmt: skip
"""What the system says of a server that is not there; MLflow wraps it in three of its own lines."""


def sweeps(store: Store, limit: int | None = None) -> dict[str, Any]:
    """Recorded sweeps, newest first: so many, or all of them."""
    return {"sweeps": [_line(run) for run in _sweep_runs(connect(store), "", limit)]}


def find(store: Store, wanted: str) -> dict[str, Any]:
    """A sweep's result, or a cell's record, by run id or the start of a sweep id.

    Raises:
        UserError: nothing, or more than one thing, answers to that name.
    """
    client = connect(store)
    if not wanted:
        newest = _sweep_runs(client, "attributes.status = 'FINISHED'", 1)
        if not newest:
            raise UserError(
                "no finished sweep is recorded yet; make one with: halfstep sweep CONFIG"
            )
        return _result(client, newest[0])
    matches = _named(client, wanted)
    matches = [r for r in matches if r.data.tags[PREFIX + "sweep_id"] == wanted] or matches
    if len(matches) > 1:
        names = ", ".join(r.data.tags[PREFIX + "sweep_id"] for r in matches[:5])
        raise UserError(f"{wanted!r} is the start of more than one sweep: {names}")
    if matches:
        return _result(client, matches[0])
    try:
        run = client.get_run(wanted)
    except MlflowException:
        newest = _sweep_runs(client, "", 5)
        known = ", ".join(r.data.tags[PREFIX + "sweep_id"] for r in newest) or "none"
        raise UserError(f"no run or sweep {wanted!r} is recorded; newest sweeps: {known}") from None
    if PREFIX + "kind" not in run.data.tags:
        raise UserError(f"run {wanted!r} was not recorded by halfstep")
    if run.data.tags[PREFIX + "kind"] == "sweep":
        return _result(client, run)
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "kind": run.data.tags[PREFIX + "kind"],
        "status": run.info.status.lower(),
        "verdict": run.data.tags.get(PREFIX + "verdict"),
        "sweep_id": run.data.tags.get(PREFIX + "sweep_id", ""),
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "note": run.data.tags.get(NOTE, ""),
    }


def highest_number(store: Store, stem: str) -> int:
    """Of the sweeps whose id begins with this; 0 where there is none."""
    found = _sweep_runs(connect(store), f"tags.`{PREFIX}sweep_id` LIKE '{stem}-%'")
    names = [run.data.tags[PREFIX + "sweep_id"] for run in found]
    return max((int(name.rpartition("-")[2]) for name in names), default=0)


def sweep_run(store: Store, wanted: str) -> str:
    """The run of a sweep that goes by its id, the start of that, its run, or a run below it.

    Raises:
        UserError: nothing, or more than one thing, answers to that name.
    """
    found = find(store, wanted)
    if "cells" in found or not found["sweep_id"]:
        return str(found["run_id"])
    with suppress(UserError):  # an analysis that stands by itself is below no sweep
        return str(find(store, found["sweep_id"])["run_id"])
    return str(found["run_id"])


def reachable(store: Store) -> None:
    """Raises UserError where the configured tracking server does not answer, or refuses."""
    try:
        connect(store).search_experiments(max_results=1)
    except MlflowException as error:
        silent = NO_ANSWER.search(str(error))
        said = f"no answer ({silent[0]})" if silent else first_words(error)
        raise UserError(f"MLFLOW_TRACKING_URI is {store.shown_uri}: {said}") from error


def artifacts_writable(store: Store) -> str:
    """Writes a small file where a tracking server keeps artifacts and removes it; says where.

    Raises:
        UserError: that fails.
    """
    place = "its artifact store"
    try:
        home = connect(store).get_experiment("0")
        place = without_credentials(home.artifact_location)
        name = f"halfstep-doctor-{uuid.uuid4().hex}"
        repository = get_artifact_repository(home.artifact_location, store.tracking_uri)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_text("halfstep doctor")
            repository.log_artifact(str(path))
        repository.delete_artifacts(name)
    except Exception as error:  # MLflow's own types, and those of every kind of store
        raise UserError(
            f"{store.shown_uri} cannot write to {place}: {first_words(error)}"
        ) from error
    return place


def _named(client: MlflowClient, wanted: str) -> list[Run]:
    """The sweeps whose id, or whose run's id, begins so."""
    found: list[Run] = []
    if SWEEP_NAME.fullmatch(wanted):
        found = _sweep_runs(client, f"tags.`{PREFIX}sweep_id` LIKE '{wanted}%'")
    if not found and RUN_NAME.fullmatch(wanted):
        found = [run for run in _sweep_runs(client, "") if run.info.run_id.startswith(wanted)]
    return found


def _sweep_runs(client: MlflowClient, query: str, limit: int | None = None) -> list[Run]:
    experiments = [e.experiment_id for e in client.search_experiments(max_results=1000)]
    asked = " AND ".join(filter(None, [f"tags.`{PREFIX}kind` = 'sweep'", query]))
    newest_first = ["attributes.start_time DESC"]
    if limit is None:
        return search_all(client, experiments, asked, newest_first)
    return list(client.search_runs(experiments, asked, max_results=limit, order_by=newest_first))


def _line(run: Run) -> dict[str, Any]:
    tags = run.data.tags
    return {
        "sweep_id": tags[PREFIX + "sweep_id"],
        "run_id": run.info.run_id,
        "name": run.info.run_name.split(" · ")[0],
        "started": run.info.start_time,
        "status": run.info.status.lower(),
        "verdict": tags.get(PREFIX + "verdict"),
        "cell": tags.get(PREFIX + "cell"),
        "signed_off": tags.get(PREFIX + "signed_off"),
        "subject_digest": tags.get(PREFIX + "subject_digest"),
        "protocol_digest": tags.get(PREFIX + "protocol_digest"),
    }


def _result(client: MlflowClient, run: Run) -> dict[str, Any]:
    sweep_id = run.data.tags[PREFIX + "sweep_id"]
    if run.info.status != "FINISHED":
        raise UserError(
            f"sweep {sweep_id} is not finished ({run.info.status.lower()}); run its config again "
            "to take it up"
        )
    try:
        result: dict[str, Any] = json.loads(stored(client, run.info.run_id, RESULT))
    except (MlflowException, OSError) as error:
        raise UserError(f"sweep {sweep_id} has lost its artifact {RESULT}: {error}") from error
    return result
