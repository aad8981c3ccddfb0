"""The sweep as a Prefect flow. Deploy it as ``flows.sweep.sweep``."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from audit.issuer import issuer
from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan
from flows.prefect_artifacts import leave_artifacts, watched
from flows.runners import LOCAL, Runner
from tasks.orchestrated import TASKS

HERE = Runner()


@flow(
    name="halfstep sweep",
    flow_run_name="sweep {config}",
    persist_result=False,
    validate_parameters=False,
)
def sweep(
    config: str,
    store: str = "mlruns",
    fresh: bool = False,
    author: str = "",
    key: str | None = None,
    runner: str = LOCAL,
    address: str = "",
    workers: int = 2,
    depot: str = "",
) -> dict[str, Any]:
    """Sweeps one config; the tasks are load, reference, calibrate, each cell, decide, record.

    Args:
        config: file of the config, where this flow runs.
        store: folder of the store, where this flow runs.
        fresh: run anew; reuse nothing.
        author: who answers for it.
        key: file of the private key that signs, where this flow runs.
        runner, address, workers, depot: see `flows.runners.Runner`.
    """
    path, where = Path(config), Store(Path(store))
    plan, by = read_plan(path), Runner(runner, address, workers, depot)
    by.check()
    with watched(), by.crew(where) as crew:
        result = conduct(
            plan,
            path.read_text(),
            where,
            fresh=fresh,
            steps=TASKS,
            crew=crew,
            issuer=issuer(author, Path(key) if key else None),
        )
    leave_artifacts(result, where)
    return result


def run_flow(
    config: str,
    store: str,
    fresh: bool,
    author: str = "",
    key: str | None = None,
    runner: Runner = HERE,
) -> dict[str, Any]:
    """The flow as the command line runs it.

    Without heartbeats: their thread sleeps a second at the end of every flow, and a process that
    somebody watches needs none.
    """
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        result: dict[str, Any] = sweep(config, store, fresh, author, key, *astuple(runner))
    return result
