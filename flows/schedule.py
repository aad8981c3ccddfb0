"""`halfstep schedule`: a sweep by the clock, as a served Prefect deployment; what was missed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from flows.config import read_plan
from flows.events import emit
from flows.launch import Launch
from flows.server import configured_api
from halfstep.errors import UserError, first_line

GRACE = timedelta(minutes=2)
"""A run that has not begun so long after its time is late."""
LOOKED_BACK = timedelta(days=7)
MOST_RUNS = 200
BEGUN = ("RUNNING", "COMPLETED", "FAILED", "CRASHED", "PAUSED", "CANCELLING")
NEVER_MADE = "never scheduled: no Prefect server was running"
NOT_SERVED = "late: nobody serves the deployment"
OVERLAPPED = "cancelled: the run before was still going, or somebody cancelled it"


@dataclass(frozen=True)
class Scheduled:
    """A config by the clock."""

    launch: Launch
    cron: str
    timezone: str = "UTC"
    name: str = ""

    @property
    def deployment(self) -> str:
        """What the deployment is called."""
        return self.name or read_plan(self.launch.config).name

    def check(self) -> None:
        """Raises UserError where the config, the cron line or the time zone cannot be used, or no
        Prefect server is there to keep the schedule."""
        read_plan(self.launch.config)
        self.launch.runner.check()
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise UserError(
                f"--timezone {self.timezone!r} is not known; as in Europe/Berlin"
            ) from error
        try:
            times(self.cron, self.timezone, datetime.now(UTC), datetime.now(UTC))
        except ValueError as error:
            raise UserError(
                f"--cron {self.cron!r} is not allowed: {first_line(error)}; as in '0 3 * * *': at "
                "three every night"
            ) from error
        if not configured_api():
            raise UserError(
                "a schedule is kept by a Prefect server, and none is configured; start one "
                "(prefect server start) and set PREFECT_API_URL=http://127.0.0.1:4200/api"
            )


def serve(scheduled: Scheduled) -> None:
    """Serves the deployment until it is stopped. One run at a time: a run that is due while
    another still goes is cancelled, and shown so."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.flows import EntrypointType
    from prefect.schedules import Cron

    from flows.sweep import sweep

    started, runner = scheduled.launch, scheduled.launch.runner
    sweep.serve(
        name=scheduled.deployment,
        schedule=Cron(scheduled.cron, timezone=scheduled.timezone),
        parameters={
            "config": str(started.config.absolute()),
            "store": str(started.store.absolute()),
            "author": started.author,
            "key": str(started.key.absolute()) if started.key else None,
            "runner": runner.kind,
            "address": runner.address,
            "workers": runner.workers,
            "depot": runner.depot,
        },
        global_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
        ),
        pause_on_shutdown=False,
        print_starting_message=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def standing(deployment: str) -> dict[str, Any]:
    """How a scheduled config stands: the last run, the next, and what was missed.

    Raises:
        UserError: there is no such deployment.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    full = f"halfstep sweep/{deployment}"
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(full)
        except ObjectNotFound as error:
            raise UserError(
                f"the Prefect server has no deployment {full!r}; make it with: halfstep schedule "
                "CONFIG --cron '0 3 * * *'"
            ) from error
        runs = _runs(client, found.id)
    now = datetime.now(UTC)
    crons = [one.schedule for one in found.schedules if hasattr(one.schedule, "cron")]
    begun = [run for run in runs if run["state"] in BEGUN]
    due = [run for run in runs if run["state"] == "SCHEDULED" and run["at"] > now]
    lost = []
    for one in crons:
        since = max(found.created, now - LOOKED_BACK)
        lost += missed(times(one.cron, one.timezone or "UTC", since, now - GRACE), runs)
    return {
        "deployment": full,
        "cron": [one.cron for one in crons],
        "last": _shown(max(begun, key=lambda run: run["at"], default=None)),
        "next": _shown(min(due, key=lambda run: run["at"], default=None)),
        "missed": lost,
    }


def missed(expected: Sequence[datetime], runs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The times at which no run began, and why.

    Args:
        runs: each with ``at``, its scheduled time, and ``state``, the type of its state.
    """
    states: dict[datetime, list[str]] = {}
    for run in runs:
        states.setdefault(run["at"].replace(microsecond=0), []).append(run["state"])
    found = []
    for at in expected:
        own = states.get(at.replace(microsecond=0), [])
        if any(state in BEGUN for state in own):
            continue
        why = NEVER_MADE if not own else OVERLAPPED if "CANCELLED" in own else NOT_SERVED
        found.append({"at": at.isoformat(), "why": why})
    return found


def times(cron: str, timezone: str, since: datetime, until: datetime) -> list[datetime]:
    """When a cron line is due, in UTC.

    Raises:
        ValueError: it is no cron line.
    """
    from prefect.server.schemas.schedules import CronSchedule

    schedule = CronSchedule(cron=cron, timezone=timezone)
    found = asyncio.run(schedule.get_dates(n=MOST_RUNS, start=since, end=until))
    return [one.astimezone(UTC) for one in found if since <= one <= until]


def tell_missed(found: dict[str, Any]) -> None:
    """An event for automations where runs were missed."""
    if found["missed"]:
        emit("halfstep.schedule.missed", found["deployment"], found)


def _runs(client: Any, deployment_id: Any) -> list[dict[str, Any]]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=MOST_RUNS,
    )
    return [
        {
            "at": (run.next_scheduled_start_time or run.expected_start_time).astimezone(UTC),
            "state": run.state_type.value,
            "name": run.state_name,
            "id": str(run.id),
        }
        for run in runs
    ]


def _shown(run: dict[str, Any] | None) -> dict[str, str] | None:
    if run is None:
        return None
    return {"at": run["at"].isoformat(), "state": run["name"], "id": run["id"]}
