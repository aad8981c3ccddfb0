"""What a watcher tells: a line an event."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from audit.note import taken_text
from flows.show import say

COLOURS = {"stands": "green", "swept": "green", "undecided": "yellow", "regression": "red",
           "failed": "red", "outage": "yellow"}  # fmt: skip


def event_printer(as_json: bool) -> Callable[[Mapping[str, Any]], None]:
    """For programs, one JSON document a line; or for people."""
    return _json_line if as_json else _line


def _json_line(event: Mapping[str, Any]) -> None:
    print(json.dumps(event, ensure_ascii=False), flush=True)


def _line(event: Mapping[str, Any]) -> None:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))
    version = f" version {event['version']}" if "version" in event else ""
    why = event.get("why") or event.get("reason")
    say(f"{at} {event['model']}{version}: {event['event'].upper()}: {why}",
        style=COLOURS.get(event["event"]))  # fmt: skip
    if "sweep_id" in event:
        say(f"  sweep {event['sweep_id']}: {event['verdict']}, {event['cell'] or 'no scheme'}; "
            f"reused: {taken_text(event['reused'])}")  # fmt: skip


def print_standing(found: Mapping[str, Any]) -> None:
    """How a schedule stands."""
    say(f"{found['deployment']}: {', '.join(found['cron']) or 'no schedule'}")
    for name in ("last", "next"):
        run = found[name]
        say(f"{name}: " + (f"{run['at']} {run['state']} (flow run {run['id']})" if run else "none"))
    for one in found["missed"]:
        say(f"missed: {one['at']}: {one['why']}", style="yellow")
