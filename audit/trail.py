"""The trail: projects committed records into MLflow, so that doing it twice changes nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

from mlflow.entities import (  # noqa: E402  (mlflow reads the settings above when imported)
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from audit import artifacts, models, spool, view  # noqa: E402
from audit.evidence import (  # noqa: E402
    EVIDENCE,
    NOTE,
    PARENT,
    PREFIX,
    RUN_NAME,
    Snapshot,
    evidence_bytes,
)
from audit.experiments import open_experiment  # noqa: E402
from audit.ledger import DECISION, Entry, Settings  # noqa: E402
from audit.ledger_runs import LedgerWriter  # noqa: E402
from audit.spool import Record  # noqa: E402
from audit.store import Store  # noqa: E402
from halfstep.digest import digest_bytes  # noqa: E402
from halfstep.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from audit.signing import Signer

LONGEST_NOTE = 7900
WRITER = "halfstep-writer"
"""A tag of a sweep that is being written, on servers; no part of the evidence."""
LONGEST_PARAM = 5900
NOBODYS = '{"writer": "", "host": "another machine", "settled": false}'
SETTLED = 1.0
"""Seconds after which what one machine wrote to a server is seen by all."""
DATA_SOURCE_TYPE = "code"
NOTHING_SET = Settings()


def connect(store: Store) -> MlflowClient:
    """A client on the store; makes the embedded one where there is none.

    Raises:
        UserError: the embedded database is damaged.
    """
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if store.embedded:
        check_database(store.database)
        store.artifacts.mkdir(parents=True, exist_ok=True)
        if not store.database.exists():
            _make_database(store.database)
    return MlflowClient(store.tracking_uri)


def check_database(path: Path) -> None:
    """Raises UserError where a database file is there but is not a usable SQLite database."""
    if not path.exists():
        return
    with path.open("rb") as file:
        head = file.read(16)
    if head != b"SQLite format 3\0":
        what = "is empty" if not head else "is not an SQLite database"
        raise UserError(
            f"tracking store {path} {what}. Restore it from a backup; or move it and "
            "ledger.jsonl away and run the sweep again: what the spool holds is recorded anew"
        )


def _make_database(path: Path) -> None:
    """Makes the embedded database aside and moves it in place whole.

    MLflow's migrations take seconds and do not survive being killed half way: the next start would
    find tables that "already exist".
    """
    for leftover in path.parent.glob(f".{path.name}.making-*"):
        leftover.unlink()
    making = path.with_name(f".{path.name}.making-{os.getpid()}")
    SqlAlchemyStore(f"sqlite:///{making}", artifacts.location(""))
    with contextlib.closing(sqlite3.connect(making)) as connection:
        connection.execute("PRAGMA journal_mode=wal")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    making.replace(path)


def mlflow_download(store: Store, address: str, folder: str) -> str:
    """Copies what ``models:/…`` or ``runs:/…`` names to a folder; returns its path."""
    from mlflow.artifacts import download_artifacts

    address = model_location(connect(store), address)
    return str(
        download_artifacts(artifact_uri=address, dst_path=folder, tracking_uri=store.tracking_uri)
    )


def model_location(client: MlflowClient, address: str) -> str:
    """Where a model's files lie. MLflow would ask the process's global store, not this client's."""
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if not ModelsArtifactRepository.is_models_uri(address):
        return address
    model, path = ModelsArtifactRepository.split_models_uri(address)
    found = get_model_name_and_version(client, model)
    if len(found) == 1:
        place = client.get_logged_model(found[0]).artifact_location
    else:
        place = model_location(client, client.get_model_version_download_uri(*found))
    return f"{place.rstrip('/')}/{path}".rstrip("/")


class Trail:
    """Writes one sweep's records. All calls come from one thread.

    What is written to each run is kept as a `Snapshot` too: its evidence is what was meant to be
    recorded, not what the store says afterwards.
    """

    def __init__(
        self, store: Store, experiment: str, sweep_id: str, signer: Signer | None = None
    ) -> None:
        self._client = connect(store)
        self._ledger = LedgerWriter(store, self._client, signer)
        self._written: dict[str, Snapshot] = {}
        self._sealed: dict[str, str] = {}
        self.claimed = ""
        """The run that this process writes, on a server."""
        self._sweep_id = sweep_id
        tags = {PREFIX + "experiment": "1"}
        self._experiment_id = open_experiment(self._client, store, experiment, tags)
        self._known: dict[str, Run] = {}
        self.renew()
        if store.embedded:
            self._end_stale()

    @property
    def experiment_id(self) -> str:
        return self._experiment_id

    def renew(self) -> None:
        """Looks up what the store holds of this sweep: after a call that failed, it may hold what
        nobody was told of."""
        found = self._search(f"tags.`{PREFIX}sweep_id` = '{self._sweep_id}'")
        self._known = {run.data.tags[PREFIX + "record"]: run for run in reversed(found)}

    def suspend(self, run_id: str, note: str) -> None:
        """Closes the run of a sweep that was told to stop; the next run of it opens it again."""
        self._client.set_tag(run_id, NOTE, note[:LONGEST_NOTE])
        self._client.set_terminated(run_id, "KILLED")
        if run_id == self.claimed:
            self._client.delete_tag(run_id, WRITER)

    def claim(self, run_id: str, key: str, writer: str) -> str | None:
        """Makes ``writer`` the one that writes a sweep; the mark of another that was there before.

        MLflow has neither locks nor compare-and-set. Of several machines that start one sweep at
        once, each marks its run, waits until all marks can be seen, and yields to a run that was
        settled before, or to the oldest.

        Raises:
            UserError: another machine was first.
        """
        mark = self.marked(run_id)
        if mark is not None and json.loads(mark)["writer"] != writer:
            return mark
        if mark is None or not json.loads(mark)["settled"]:
            self.beat(run_id, writer, settled=False)
            time.sleep(SETTLED)
            found = {
                run.info.run_id: run for run in self._search(f"tags.`{PREFIX}record` = '{key}'")
            }
            marks = {
                one: json.loads(run.data.tags.get(WRITER, NOBODYS)) for one, run in found.items()
            }
            settled = [one for one in marks if one != run_id and marks[one]["settled"]]
            oldest = min(found, key=lambda one: (found[one].info.start_time, one))
            if settled or oldest != run_id or marks[run_id]["writer"] != writer:
                if len(found) > 1:
                    self._client.delete_run(run_id)
                first = marks[settled[0] if settled else oldest]
                raise written_elsewhere(self._ledger.store, first["host"])
        self.beat(run_id, writer)
        return None

    def beat(self, run_id: str, writer: str, *, settled: bool = True) -> None:
        """Renews the mark."""
        mark = {"writer": writer, "host": platform.node(), "settled": settled,
                "beat": uuid.uuid4().hex[:8]}  # fmt: skip
        self._client.set_tag(run_id, WRITER, json.dumps(mark))
        self.claimed = run_id

    def marked(self, run_id: str) -> str | None:
        """The mark of whoever writes a sweep."""
        mark = self._client.get_run(run_id).data.tags.get(WRITER)
        return None if mark is None else str(mark)

    def latest_decision(self) -> dict[str, str] | None:
        """The newest decision in the experiment that is not this sweep's own."""
        finished = self._client.search_runs(
            [self._experiment_id],
            f"tags.`{PREFIX}kind` = 'sweep' AND attributes.status = 'FINISHED'",
            max_results=2,
            order_by=["attributes.end_time DESC"],
        )
        for run in finished:
            tags = run.data.tags
            if tags[PREFIX + "sweep_id"] != self._sweep_id and PREFIX + "decision_digest" in tags:
                names = ("sweep_id", "decision_digest", "verdict", "cell")
                return {"run_id": run.info.run_id, **{n: tags[PREFIX + n] for n in names}}
        return None

    def begin(self, record: Record, parent: str | None = None) -> str:
        """The run of a record: made if it is not there, and left alone if it is. Returns its id."""
        key = record.identity
        if key not in self._known:
            self._known[key] = self._client.create_run(
                self._experiment_id,
                start_time=_started(record),
                tags=self._tags(record, parent),
                run_name=record.name,
            )
        return str(self._known[key].info.run_id)

    def run(self, record: Record, folder: Path, parent: str | None = None) -> str:
        """The run of a record, complete. Returns its id.

        A run of the same work that another machine began and did not end is set aside: its times
        are not this record's, and its evidence would hold neither machine's.
        """
        found = self._known.get(record.identity)
        if found is not None and found.info.start_time != _started(record):
            self._client.delete_run(found.info.run_id)
            del self._known[record.identity]
        elif found is not None and found.info.status == "KILLED":
            self._client.update_run(found.info.run_id, "RUNNING")
        run_id = self.begin(record, parent)
        self._written[run_id] = Snapshot(
            run_id,
            self._experiment_id,
            record.name,
            "RUNNING",
            _started(record),
            None,
            tags={**self._tags(record, parent), RUN_NAME: record.name},
        )
        self.add(run_id, record, folder)
        return run_id

    def _tags(self, record: Record, parent: str | None) -> dict[str, str]:
        tags = {
            PREFIX + "record": record.identity,
            PREFIX + "sweep_id": self._sweep_id,
            PREFIX + "kind": record.kind,
            **{PREFIX + name: value for name, value in record.tags.items()},
        }
        return tags | ({PARENT: parent} if parent else {})

    def add(self, run_id: str, record: Record, folder: Path) -> None:
        """Logs a record's params, metrics, tags and files on a run that exists."""
        at = round(record.ended * 1000)
        metrics = [Metric(name, value, at, 0) for name, value in record.metrics.items()]
        params = [Param(k, v[:LONGEST_PARAM]) for k, v in record.params.items()]
        for start in range(0, max(len(params), 1), 100):
            self._client.log_batch(
                run_id, metrics if start == 0 else [], params[start : start + 100]
            )
        if record.files:
            self._client.log_artifacts(run_id, str(folder / spool.FILES))
        written = self._written[run_id]
        written.metrics |= {name: [(float(value), at, 0)] for name, value in record.metrics.items()}
        written.params |= {param.key: param.value for param in params}
        written.artifacts |= record.files

    def attach(self, run_id: str, name: str, data: bytes) -> None:
        """One artifact from memory."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(data)
            self._client.log_artifact(run_id, str(path))
        if name != EVIDENCE:
            self._written[run_id].artifacts[name] = digest_bytes(data)

    def datasets(self, run_id: str, splits: Sequence[Mapping[str, Any]]) -> None:
        """Dataset inputs, one a split, with our digest of the full content as a tag."""
        inputs = [
            DatasetInput(
                Dataset(
                    name=described["name"],
                    digest=described["sha256"][:32],
                    source_type=DATA_SOURCE_TYPE,
                    source=described["source"],
                    profile=described["profile"],
                ),
                [
                    InputTag("mlflow.data.context", described["context"]),
                    InputTag(PREFIX + "sha256", described["sha256"]),
                    InputTag(PREFIX + "examples", str(described["examples"])),
                ],
            )
            for described in splits
        ]
        self._client.log_inputs(run_id, datasets=inputs)
        self._written[run_id].inputs = [described_input(found) for found in inputs]

    def end(
        self,
        run_id: str,
        tags: Mapping[str, str],
        note: str,
        ended: float,
        ok: bool,
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Tags a run, leaves its evidence and closes it; returns the digest of the evidence.

        The children come before their parent, whose evidence holds the digests of theirs.

        Args:
            metrics: what became known after the run's own record; a name of it stays its own.
        """
        marks = {PREFIX + name: value for name, value in tags.items()}
        marks[NOTE] = note[:LONGEST_NOTE]
        written, at = self._written[run_id], round(ended * 1000)
        late = {n: float(v) for n, v in (metrics or {}).items() if n not in written.metrics}
        self._client.log_batch(
            run_id,
            [Metric(name, value, at, 0) for name, value in late.items()],
            tags=[RunTag(*mark) for mark in marks.items()],
        )
        written.tags |= marks
        written.metrics |= {name: [(value, at, 0)] for name, value in late.items()}
        written.status = "FINISHED" if ok else "FAILED"
        written.ended = max(at, written.started)
        children = {
            child: digest
            for child, digest in self._sealed.items()
            if self._written[child].tags.get(PARENT) == run_id
        }
        evidence = evidence_bytes(written, children)
        self.attach(run_id, EVIDENCE, evidence)
        self._client.set_terminated(run_id, written.status, end_time=written.ended)
        if run_id == self.claimed:
            self._client.delete_tag(run_id, WRITER)
            self.claimed = ""
        self._sealed[run_id] = digest_bytes(evidence)
        return self._sealed[run_id]

    def stored(self, run_id: str, name: str) -> bytes:
        """An artifact as the store holds it."""
        return stored(self._client, run_id, name)

    def entered(self) -> Entry | None:
        """The ledger's entry of this sweep's decision, where there is one already."""
        return self._ledger.find(DECISION, self._sweep_id)

    def offer_view(self, headlines: Sequence[str], params: Sequence[str]) -> None:
        """Leaves the auditors' view of the runs table."""
        shown = view.cells_view(headlines, params)
        self._client.set_experiment_tag(self._experiment_id, view.TAG, shown)

    def enter(
        self,
        kind: str,
        about: str,
        what: Mapping[str, Any],
        shows: Mapping[str, Any],
        note: str | None = None,
        sets: Settings = NOTHING_SET,
    ) -> Entry:
        """Enters this sweep into the ledger. ``note`` becomes the experiment's: what the reader of
        the UI sees first."""
        if note is not None:
            described = {self._experiment_id: {NOTE: note[:LONGEST_NOTE]}}
            sets = sets.then(Settings(experiments=described))
        return self._ledger.append(kind, self._sweep_id, about, what, sets, shows)

    def register(
        self,
        name: str,
        run_id: str,
        record: Record,
        folder: Path,
        tags: Mapping[str, str],
        description: str,
    ) -> tuple[models.Version, Settings]:
        """A registered version that holds a variant's files, and what the ledger says of it."""
        own = f"variant:{self._sweep_id}"
        version = models.register(
            self._client,
            self._ledger.store.embedded,
            self._experiment_id,
            run_id,
            name,
            own,
            folder / spool.FILES,
            tags,
            description,
        )
        held = {
            "model_id": version.model_id,
            "source": version.source,
            "run_id": run_id,
            "description": description,
            "files": record.files,
            "tags": {PREFIX + "record": own, **{PREFIX + k: v for k, v in tags.items()}},
        }
        return version, Settings(versions={version.key: held})

    def _end_stale(self) -> None:
        """Runs that another killed sweep left open are shown as killed, until it is taken up."""
        ours = {run.info.run_id for run in self._known.values()}
        for run in self._search("attributes.status = 'RUNNING'"):
            if PREFIX + "sweep_id" in run.data.tags and run.info.run_id not in ours:
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _search(self, query: str) -> list[Run]:
        return search_all(self._client, [self._experiment_id], query)


def _started(record: Record) -> int:
    """Milliseconds since the epoch."""
    return round(record.started * 1000)


def written_elsewhere(store: Store, host: str) -> UserError:
    return UserError(
        f"the same sweep is being written to {store.shown_uri} from {host}; wait for it to end, "
        "then run this again to see what it came to"
    )


def stored(client: MlflowClient, run_id: str, path: str) -> bytes:
    """An artifact's bytes. MLflow's errors, and the OS's, are the caller's to word."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run_id, path, folder)).read_bytes()


def described_input(found: DatasetInput) -> dict[str, Any]:
    """A dataset input as evidence holds it."""
    dataset = found.dataset
    names = ("name", "digest", "source_type", "source", "profile", "schema")
    return {
        **{name: getattr(dataset, name) for name in names},
        "tags": {tag.key: tag.value for tag in found.tags},
    }


def search_all(
    client: MlflowClient,
    experiments: list[str],
    query: str,
    order_by: list[str] | None = None,
    which: int = ViewType.ACTIVE_ONLY,
) -> list[Run]:
    """Every run that a query finds, over all of its pages."""
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            experiments, query, which, 1000, order_by=order_by, page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def has_run(store: Store, run_id: str) -> bool:
    """Whether the tracking store holds a run, finished and not deleted."""
    if store.embedded and not store.database.exists():
        return False
    try:
        run = connect(store).get_run(run_id)
    except MlflowException:
        return False
    return bool(run.info.lifecycle_stage == "active" and run.info.status == "FINISHED")
