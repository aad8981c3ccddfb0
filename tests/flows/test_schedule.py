"""Schedules: a served deployment, one run at a time, and what was missed."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from recorded import small_config
from waiting import LIMIT, until

from flows.launch import Launch
from flows.runners import Runner
from flows.schedule import (
    NEVER_MADE,
    NOT_SERVED,
    OVERLAPPED,
    Scheduled,
    missed,
    standing,
    times,
)
from halfstep.errors import UserError

DAY = datetime(2026, 3, 28, tzinfo=UTC)


def test_when_a_cron_line_is_due():
    found = times("0 3 * * *", "Europe/Berlin", DAY, DAY + timedelta(days=3))
    # Summer time begins on the 29th: three in the morning comes an hour earlier.
    assert [one.hour for one in found] == [2, 1, 1]
    assert times("0 3 * * *", "UTC", DAY, DAY) == []


def test_what_was_missed_and_why():
    due = [DAY + timedelta(days=n) for n in range(6)]
    runs = [
        {"at": due[0], "state": "COMPLETED"},
        {"at": due[1], "state": "SCHEDULED"},
        {"at": due[2], "state": "CANCELLED"},
        {"at": due[4] + timedelta(milliseconds=3), "state": "FAILED"},
        {"at": due[5], "state": "CANCELLED"},
        {"at": due[5], "state": "RUNNING"},
    ]
    assert [(one["at"], one["why"]) for one in missed(due, runs)] == [
        (due[1].isoformat(), NOT_SERVED),
        (due[2].isoformat(), OVERLAPPED),
        (due[3].isoformat(), NEVER_MADE),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cron": "at noon"}, "--cron 'at noon' is not allowed"),
        ({"timezone": "Mars/Olympus"}, "--timezone 'Mars/Olympus' is not known"),
        ({}, "none is configured; start one .prefect server start."),
    ],
)
def test_what_cannot_be_scheduled(tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "no-home"))
    launch = Launch(small_config(tmp_path), tmp_path / "s", runner=Runner())
    with pytest.raises(UserError, match=message):
        Scheduled(launch, **{"cron": "0 3 * * *", **change}).check()


def planned():
    """How the schedule stands, once a run of it is due."""
    with suppress(UserError):  # not served yet
        found = standing("tiny")
        return found["next"] and found
    return None


def ended(client, runs):
    states = [client.read_flow_run(run.id).state for run in runs]
    return all(state.is_final() for state in states) and states


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_served_schedule_runs_one_at_a_time(tmp_path, store):
    from prefect.client.orchestration import get_client
    from prefect.deployments import run_deployment
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    config = small_config(tmp_path)
    with prefect_test_harness(server_startup_timeout=LIMIT):
        environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(),
                       "PREFECT_HOME": str(tmp_path / "prefect")}  # fmt: skip
        command = [sys.executable, "-m", "flows.cli", "schedule", str(config), "--store",
                   str(store.path)]  # fmt: skip
        served = subprocess.Popen(
            [*command, "--cron", "0 3 * * *", "--timezone", "Europe/Berlin"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            found = until(planned, served, pause=0.5)
            assert found["cron"] == ["0 3 * * *"]
            assert found["last"] is None
            assert found["missed"] == []
            runs = [run_deployment("halfstep sweep/tiny", timeout=0) for _ in range(2)]
            with get_client(sync_client=True) as client:
                states = until(lambda: ended(client, runs), served, pause=0.5)
            assert sorted(state.type.value for state in states) == ["CANCELLED", "COMPLETED"]
            shown = subprocess.run([*command, "--json"], env=environment, capture_output=True,
                                   text=True, check=True)  # fmt: skip
            assert json.loads(shown.stdout)["last"]["state"] == "Completed"
        finally:
            served.send_signal(signal.SIGINT)
            served.communicate(timeout=LIMIT)
    assert len(list(store.spool.glob("*/sweep.json"))) == 1
