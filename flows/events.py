"""Telling Prefect what happened, so that its automations can act on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.progress import reporter
from flows.server import configured_api
from halfstep.errors import UserError


def emit(name: str, model: str, payload: Mapping[str, Any]) -> None:
    """Sends an event about a registered model where a Prefect server is configured. One that is
    down is told, and stops nothing: the event is in the ledger too."""
    try:
        if not configured_api():
            return
    except UserError as error:
        reporter().warn(f"event {name} was not sent: {error}")
        return
    from prefect.events import emit_event
    from prefect.events.worker import EventsWorker

    resource = {"prefect.resource.id": f"halfstep.model.{model}", "prefect.resource.name": model}
    emit_event(name, resource, payload=dict(payload))
    EventsWorker.instance().wait_until_empty()
