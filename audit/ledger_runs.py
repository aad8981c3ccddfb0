"""The ledger in MLflow: one run an entry, and a witness of what this store appended beside it.

An entry is entered in this order: its run, open, with the document; what it sets elsewhere; the
head; its run is closed; the witness. Killed in between, the open run says what was under way, and
the next append tidies up.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit import ledger, view
from audit.evidence import DELETED, NOTE, PREFIX
from audit.experiments import open_experiment
from audit.ledger import ENTRY, ENVELOPE, PUBLIC_KEY, Entry, Place, Settings, record_of
from audit.models import set_aliases
from audit.store import Store
from halfstep.errors import Tampered

if TYPE_CHECKING:
    from audit.signing import Signer

HEAD = PREFIX + "head"
SETTLED = 0.5
NOTE_TEXT = (
    "The ledger of halfstep: one run for each decision, review and rollback; each holds the digest "
    "of the one before it. `halfstep verify` checks the chain and all that it names."
)


@dataclass(frozen=True)
class LedgerWriter:
    """Appends entries. On an embedded store the caller holds its lock."""

    store: Store
    client: MlflowClient
    signer: Signer | None = None

    def find(self, kind: str, key: str) -> Entry | None:
        """The entry of an event that was entered before."""
        found = experiment(self.client)
        if found is None or found.lifecycle_stage == DELETED:
            return None
        self._tidy(found.experiment_id, record_of(kind, key))
        runs = self.client.search_runs(
            [found.experiment_id],
            f"tags.`{PREFIX}record` = '{record_of(kind, key)}' AND attributes.status = 'FINISHED'",
        )
        return read(self.client, runs[0]) if runs else None

    def append(
        self,
        kind: str,
        key: str,
        about: str,
        what: Mapping[str, Any],
        sets: Settings,
        shows: Mapping[str, Any],
    ) -> Entry:
        """Enters an event, once, and sets what it says; returns its entry, or that of the same
        event before."""
        earlier = self.find(kind, key)
        if earlier is not None:
            return earlier
        tags = {NOTE: NOTE_TEXT, view.TAG: view.ledger_view()}
        place = self._head()
        home = open_experiment(self.client, self.store, ledger.EXPERIMENT, tags)
        if place == ledger.START:
            sets = sets.then(Settings(experiments={home: {NOTE: NOTE_TEXT}}))
        keyid = self.signer.keyid if self.signer else None
        made = ledger.entry(place, kind, key, about, what, sets, shows, keyid)
        run = self.client.create_run(home, start_time=made.at, tags=made.tags, run_name=made.name)
        run_id = run.info.run_id
        with tempfile.TemporaryDirectory() as folder:
            for name, data in self._files(made).items():
                Path(folder, name).write_bytes(data)
            self.client.log_artifacts(run_id, folder)
        apply_settings(self.client, made.settings)
        self._move_head(home, made)
        self._close(run_id, made)
        return made

    def _files(self, made: Entry) -> dict[str, bytes]:
        files = {ENTRY: made.data}
        if self.signer is not None:
            from audit import signing  # a fifth of a second that readers need not wait

            facts = {name: made.body[name] for name in ("kind", "about", "number", "at")}
            subjects = {ENTRY: made.digest}
            files[ENVELOPE] = signing.envelope(self.signer, subjects, signing.ENTRY_TYPE, facts)
            files[PUBLIC_KEY] = self.signer.public_pem
        return files

    def _head(self) -> Place:
        """Where the next entry goes."""
        try:
            return head(self.client) or ledger.START
        except ValueError as error:
            raise Tampered(
                f"the ledger is damaged: {error}; `halfstep verify` says more"
            ) from error

    def _tidy(self, experiment_id: str, record: str) -> None:
        """Closes what a crash left open: as an entry where the head names it. On a server only this
        event's own: another machine may be at work on others."""
        ends = self._head().previous
        query = "attributes.status = 'RUNNING'"
        if not self.store.embedded:
            query += f" AND tags.`{PREFIX}record` = '{record}'"
        for run in self.client.search_runs([experiment_id], query):
            entered = run.data.tags.get(PREFIX + "digest") in ends
            made = read(self.client, run) if entered else None
            if made is not None:
                self._close(run.info.run_id, made)
            else:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _move_head(self, experiment_id: str, made: Entry) -> None:
        """What another machine entered meanwhile stays among the ends of the chain.

        MLflow cannot compare and set: another machine that read the head before us may write it
        after us, without our entry. So it counts as moved once it has held for a while.
        """
        held = self.store.embedded
        while True:
            now = self._head()
            if made.digest in now.previous or self._leads_to(experiment_id, now.previous, made):
                if held:
                    return
                held = True
                time.sleep(SETTLED)
                continue
            held = self.store.embedded
            ends = sorted({*now.previous, made.digest} - set(made.previous))
            value = {"number": max(made.number, now.number - 1), "digests": ends}
            self.client.set_experiment_tag(experiment_id, HEAD, json.dumps(value))

    def _leads_to(self, experiment_id: str, ends: Sequence[str], made: Entry) -> bool:
        """Whether one of the chain's ends comes after an entry: others have followed it since."""
        left = list(ends)
        while left:
            found = self.client.search_runs(
                [experiment_id], f"tags.`{PREFIX}digest` = '{left.pop()}'", max_results=1
            )
            entry = read(self.client, found[0]) if found else None
            if entry is not None and entry.number > made.number:
                if made.digest in entry.previous:
                    return True
                left += entry.previous
        return False

    def _close(self, run_id: str, made: Entry) -> None:
        self.client.set_terminated(run_id, "FINISHED", end_time=made.at)
        seen = {"number": made.number, "kind": made.kind, "digest": made.digest,
                "store": _name(self.store)}  # fmt: skip
        self.store.path.mkdir(parents=True, exist_ok=True)
        with self.store.witness.open("a", encoding="utf-8") as file:
            file.write(json.dumps(seen) + "\n")
            file.flush()
            os.fsync(file.fileno())


def apply_settings(client: MlflowClient, sets: Settings) -> None:
    """Makes the store hold what an entry says; doing it twice changes nothing."""
    for run_id, tags in sets.runs.items():
        now = client.get_run(run_id).data.tags
        for name, value in tags.items():
            if value is not None:
                client.set_tag(run_id, name, value)
            elif name in now:
                client.delete_tag(run_id, name)
    for experiment_id, tags in sets.experiments.items():
        for name, value in tags.items():
            if value is not None:
                client.set_experiment_tag(experiment_id, name, value)
    for key, version in sets.versions.items():
        name, _, number = key.rpartition("/")
        for tag, value in version.get("tags", {}).items():
            client.set_model_version_tag(name, number, tag, value)
    for name, wanted in sets.aliases.items():
        set_aliases(client, name, wanted)


def experiment(client: MlflowClient) -> Experiment | None:
    """The ledger's experiment, deleted or not."""
    return client.get_experiment_by_name(ledger.EXPERIMENT)


def head(client: MlflowClient) -> Place | None:
    """The place after the chain's end as the store names it; None where it names none.

    Raises:
        ValueError: what it names is no head.
    """
    found = experiment(client)
    text = found.tags.get(HEAD) if found is not None else None
    if text is None:
        return None
    try:
        value = json.loads(text)
        return Place(int(value["number"]) + 1, tuple(value["digests"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"its head cannot be read: tag {HEAD} is {text!r}") from error


def read(client: MlflowClient, run: Run) -> Entry | None:
    """The entry that a run keeps, or None where it keeps none that can be read."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run.info.run_id, ENTRY, folder)
            return ledger.read_entry(Path(path).read_bytes())
        except (MlflowException, OSError, ValueError):
            return None


def witnessed(store: Store) -> dict[str, int] | None:
    """The digests that were appended from here to this tracking store, each with its number; None
    where there is no witness.

    Raises:
        ValueError: a line of it is not as it was written.
    """
    try:
        lines = store.witness.read_bytes().splitlines()
    except OSError:
        return None
    try:
        found = [json.loads(line) for line in lines if line.strip()]
        return {str(f["digest"]): int(f["number"]) for f in found if f["store"] == _name(store)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{store.witness.name} holds a line that is no entry's ({error})"
        ) from error


def _name(store: Store) -> str:
    return "embedded" if store.embedded else store.shown_uri
