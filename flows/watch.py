"""`halfstep watch`: each new version of a registered model is swept once."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from audit import lookup
from audit.issuer import issuer
from audit.note import origins
from audit.store import Store
from audit.versions import BEFORE, FAILED, SWEPT, Cursor, Handled, announce_to, versions
from flows.config import read_plan
from flows.entering import enter_succession
from flows.events import emit
from flows.launch import Launch, launch
from flows.progress import reporter
from flows.succession import UNKNOWN, succession
from flows.webhook import listening
from halfstep.errors import Tampered, UserError
from sources.mlflow_model import MlflowModel

URI = re.compile(r"models:/(?P<name>[^/@]+)(/[^/@]+|@[^/]+)")
SECRET = "HALFSTEP_WEBHOOK_SECRET"
ATTEMPTS = 3
"""How often a version whose sweep fails is tried, at every start of the watcher: at so many looks,
because what fails may pass."""


@dataclass(frozen=True)
class Watched:
    """A registered model, and the config that its versions are swept under."""

    config: Path
    text: str
    uri: str
    """As the config names it; each version takes its place."""
    model: str
    name: str
    """Of the experiment."""

    def at(self, version: int) -> str:
        """The config of one version."""
        return self.text.replace(self.uri, f"models:/{self.model}/{version}")


def watched(config: Path) -> Watched:
    """What a config watches.

    Raises:
        UserError: its subject is no registered model, or its results would be taken for versions.
    """
    plan = read_plan(config)
    subject = plan.taken_from.value
    match = URI.fullmatch(subject.uri) if isinstance(subject, MlflowModel) else None
    if match is None:
        raise UserError(
            f"{config}: subject is {plan.taken_from.to_json('source')}; to be watched it is a "
            "version of a registered model: {source: mlflow, uri: models:/NAME/1}"
        )
    if match["name"] == plan.name:
        raise UserError(
            f"{config}: name is {plan.name!r}, and so is the watched model: the variants that "
            "sweeps register would be its next versions. Give the config another name"
        )
    text = config.read_text(encoding="utf-8")
    return Watched(config, text, subject.uri, match["name"], plan.name)


class Watcher:
    """Looks for new versions and sweeps them in order of number."""

    def __init__(
        self,
        base: Launch,
        *,
        since: int | None = None,
        told: Callable[[Mapping[str, Any]], None] = lambda event: None,
    ) -> None:
        """
        Args:
            base: how each sweep is started; its config is the one that is watched.
            since: the first version to sweep, where nothing was swept before; by default the
                newest.
            told: gets every event.
        """
        self.watched = watched(base.config)
        self._base = base
        self._since = since
        self._told = told
        self.store = Store(base.store)
        self._folder = base.store / "watch" / self.watched.name
        self.cursor = Cursor(base.store / "watch" / f"{self.watched.name}.jsonl")
        self._attempts: dict[tuple[int, int], int] = {}
        self._wake = threading.Event()

    def wake(self) -> None:
        """Looks at once, not at the next interval."""
        self._wake.set()

    def run(self, interval: float, once: bool = False) -> None:
        """Watches until it is stopped; or once, until every version has been looked at.

        Raises:
            UserError: another watcher is at work here; with ``once``, the registry fails.
        """
        with self.cursor.alone():
            while True:
                self._wake.clear()
                try:
                    left = self.look()
                except Tampered:
                    raise
                except UserError as error:
                    if once:
                        raise
                    self._tell("outage", reason=str(error))
                    left = 0
                if not once:
                    self._wake.wait(interval)
                elif not left:
                    return

    def look(self) -> int:
        """Sweeps what is new; how many versions are to be tried again.

        Raises:
            UserError: the registry does not answer.
        """
        self.store.check_writable()
        found = versions(self.store, self.watched.model)
        if not self.cursor.handled:
            self._begin(found)
        left = 0
        for version, created in found:
            known = self.cursor.handled.get((version, created))
            tried = self._attempts.get((version, created), 0)
            if known is not None and (known.outcome != FAILED or tried >= ATTEMPTS):
                continue
            self._attempts[version, created] = tried + 1
            if not self._sweep(version, created) and tried + 1 < ATTEMPTS:
                left += 1
        return left

    def _begin(self, found: list[tuple[int, int]]) -> None:
        """The first look: older versions are named, not swept."""
        newest = found[-1][0] if found else 1
        for version, created in found:
            if version < (newest if self._since is None else self._since):
                self.cursor.add(Handled(version, created, BEFORE))

    def _sweep(self, version: int, created: int) -> bool:
        """One version; whether it is done with."""
        config = self._folder / f"{version}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(self.watched.at(version), encoding="utf-8")
        reporter().say(f"{self.watched.model} version {version}")
        try:
            result = launch(replace(self._base, config=config))
        except Tampered:
            raise
        except UserError as error:
            self.cursor.add(Handled(version, created, FAILED, reason=str(error)))
            self._tell("failed", version=version, reason=str(error))
            return False
        self._follow(version, created, result)
        return True

    def _follow(self, version: int, created: int, result: Mapping[str, Any]) -> None:
        """Compares with the version before, enters that, and only then is the version done."""
        before = self.cursor.previous(version)
        previous = lookup.find(self.store, before.run_id) if before else None
        found = {
            "model": self.watched.model,
            "version": version,
            "previous_version": before.version if before else None,
            "sweep_id": result["sweep_id"],
            "run_id": result["run_id"],
            "previous_sweep_id": before.sweep_id if before else None,
            "same_subject": bool(
                previous and previous["subject_digest"] == result["subject_digest"]
            ),
            "reused": reused(result),
            **succession(previous, result),
        }
        with self.store.writing(f"watch of {self.watched.model}"):
            by = issuer(self._base.author, self._base.key)
            enter_succession(self.store, found, by)
        self._tell("swept" if found["outcome"] == UNKNOWN else found["outcome"], **found)
        done = Handled(version, created, SWEPT, str(result["sweep_id"]), str(result["run_id"]))
        self.cursor.add(done)

    def _tell(self, kind: str, **facts: Any) -> None:
        event = {"event": kind, "model": self.watched.model, "at": time.time(), **facts}
        self._told(event)
        emit(f"halfstep.version.{kind}", self.watched.model, event)


@contextmanager
def receiving(watcher: Watcher, listen: str, announce: str) -> Iterator[None]:
    """Hears MLflow's webhooks while open, where an address is given.

    Raises:
        UserError: there is no secret, or an address cannot be used.
    """
    if announce and not listen:
        raise UserError("--announce needs --listen HOST:PORT, where the messages come in")
    if not listen:
        yield
        return
    secret = os.environ.get(SECRET, "")
    if not secret:
        raise UserError(f"--listen needs {SECRET}: messages without its signature are refused")
    with listening(listen, secret, watcher.watched.model, watcher.wake) as (host, port):
        reporter().say(f"webhooks are heard on {host}:{port}")
        if announce:
            announce_to(watcher.store, announce, secret, watcher.watched.model)
        yield


def reused(result: Mapping[str, Any]) -> dict[str, int]:
    """How many pieces of a sweep were taken from which earlier one."""
    if result.get("reused"):
        return {str(result["sweep_id"]): len(result["cells"]) + len(result["confirmation"])}
    return origins(result)
