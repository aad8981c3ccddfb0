"""Versions of a registered model, as a watcher sees them, and what became of each."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.entities.webhook import WebhookAction, WebhookEntity, WebhookEvent
from mlflow.exceptions import MlflowException

from audit.evidence import PREFIX
from audit.outage import first_words
from audit.store import Store
from audit.trail import connect
from halfstep.errors import UserError

PAGE = 200
LONGEST_NAME = 62
"""Of a webhook."""
SWEPT, FAILED, BEFORE = "swept", "failed", "before"
"""What became of a version. ``before``: it was there when the watch began."""


@dataclass(frozen=True)
class Handled:
    """One line of the cursor."""

    version: int
    created: int
    """Milliseconds since the epoch, as the registry says; with the number it names a version."""
    outcome: str
    sweep_id: str = ""
    run_id: str = ""
    reason: str = ""


class Cursor:
    """What was done with each version: a file that is only ever added to, one line a version.

    A line is written after the sweep is in the trail. Killed in between, the watcher sweeps the
    version again, which finds itself recorded: so each version has one sweep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handled: dict[tuple[int, int], Handled] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                one = Handled(**json.loads(line)) if line.strip() else None
            except (ValueError, TypeError) as error:
                if number == len(lines):  # cut off by a crash: its version is looked at again
                    continue
                raise UserError(
                    f"{self.path}, line {number}: not a line of a watcher ({error}); correct or "
                    "remove it"
                ) from error
            if one is not None:
                self.handled[one.version, one.created] = one

    def add(self, one: Handled) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes().endswith(b"\n")
        with self.path.open("ab") as file:
            file.write((b"" if whole else b"\n") + json.dumps(asdict(one)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.handled[one.version, one.created] = one

    def previous(self, version: int) -> Handled | None:
        """The newest version before this one that was swept."""
        swept = [h for h in self.handled.values() if h.outcome == SWEPT and h.version < version]
        return max(swept, key=lambda h: h.version, default=None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises UserError where another watcher holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another watcher of {self.path.stem!r} is at work here") from None
        try:
            yield
        finally:
            lock.release()


def versions(store: Store, name: str) -> list[tuple[int, int]]:
    """Number and creation time of every version of a registered model, in order of number; those
    that halfstep registered itself are none.

    Raises:
        UserError: the registry does not answer, or knows no such model.
    """
    client, found, token = connect(store), [], None
    try:
        client.get_registered_model(name)
        while True:
            page = client.search_model_versions(f"name='{name}'", PAGE, page_token=token)
            found += page
            token = page.token
            if not token:
                break
    except MlflowException as error:
        raise UserError(f"{store.shown_uri}: {first_words(error)}") from error
    return sorted(
        (int(one.version), int(one.creation_timestamp))
        for one in found
        if PREFIX + "record" not in one.tags
    )


def registry_answers(store: Store, name: str) -> bool:
    """Whether the registry knows a model; False also where it does not answer."""
    try:
        connect(store).get_registered_model(name)
    except MlflowException:
        return False
    return True


def announce_to(store: Store, url: str, secret: str, name: str) -> str:
    """Has the MLflow server tell an address of each new model version; the webhook's id. An
    earlier webhook to the same address is replaced.

    Raises:
        UserError: the store has no webhooks, or refuses the address.
    """
    client = connect(store)
    made = re.sub(r"[^A-Za-z0-9._-]", "-", f"halfstep-watch-{name}")[:LONGEST_NAME].rstrip("-._")
    try:
        for one in client.list_webhooks(max_results=1000):
            if one.url == url or one.name == made:
                client.delete_webhook(one.webhook_id)
        event = WebhookEvent(WebhookEntity.MODEL_VERSION, WebhookAction.CREATED)
        return str(client.create_webhook(made, url, [event], secret=secret).webhook_id)
    except (MlflowException, NotImplementedError) as error:
        raise UserError(f"{store.shown_uri} takes no webhook: {first_words(error)}") from error
