"""Schedules: when they are due, and what was missed. Served ones are in `test_servers`."""

from datetime import UTC, datetime, timedelta

import pytest
from recorded import small_config

from flows.launch import Launch
from flows.runners import Runner
from flows.schedule import (
    NEVER_MADE,
    NOT_SERVED,
    OVERLAPPED,
    Scheduled,
    missed,
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
