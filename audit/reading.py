"""Reading a tracking store for verification: every run as a `Snapshot`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from audit import artifacts, ledger_runs
from audit.evidence import DELETED, EVIDENCE, PARENT, PREFIX, Point, Snapshot, ours
from audit.models import aliases
from audit.store import Store, SweepFolder
from audit.trail import connect, described_input, model_location, search_all
from audit.verify import FoundVersion, LedgerRun, SweepRun, ledger_files
from halfstep.digest import digest_folder


class TrackingStore:
    """A tracking store as a `audit.verify.Source`."""

    complete = True

    def __init__(self, store: Store) -> None:
        self._store = store
        self._client = connect(store)
        self._runs = {
            run.info.run_id: run
            for experiment in self._client.search_experiments(ViewType.ALL, max_results=1000)
            for run in search_all(self._client, [experiment.experiment_id], "", which=ViewType.ALL)
        }
        self._ledger: list[LedgerRun] | None = None

    def ledger(self) -> list[LedgerRun]:
        if self._ledger is None:
            found = ledger_runs.experiment(self._client)
            runs = (
                run
                for run in self._runs.values()
                if found is not None and run.info.experiment_id == found.experiment_id
            )
            self._ledger = [self._ledger_run(run) for run in runs]
        return self._ledger

    def head(self) -> Sequence[str] | None:
        place = ledger_runs.head(self._client)
        return place.previous if place else None

    def witness(self) -> Mapping[str, int] | None:
        return ledger_runs.witnessed(self._store)

    def snapshot(self, run_id: str, metrics: Iterable[str]) -> Snapshot | None:
        run = self._runs.get(run_id)
        if run is None or run.info.lifecycle_stage == DELETED:
            return None
        return self._snapshot(run, metrics)

    def artifact(self, run_id: str, path: str) -> bytes | None:
        run = self._runs.get(run_id)
        if run is None:
            return None
        with self._folder(run.info.artifact_uri, path) as folder:
            found = folder / path
            return found.read_bytes() if found.is_file() else None

    def sweeps(self) -> list[SweepRun]:
        return [
            SweepRun(
                run.info.run_id,
                run.info.run_name,
                run.info.status,
                run.info.lifecycle_stage == DELETED,
                self._interrupted(run.data.tags.get(PREFIX + "sweep_id", "")),
            )
            for run in self._runs.values()
            if run.data.tags.get(PREFIX + "kind") in ("sweep", "sensitivity")
            and PARENT not in run.data.tags
        ]

    def children(self, run_id: str) -> list[str]:
        return [
            run.info.run_id
            for run in self._runs.values()
            if run.data.tags.get(PARENT) == run_id and run.info.lifecycle_stage != DELETED
        ]

    def experiment_tags(self, experiment_id: str) -> Mapping[str, str] | None:
        try:
            found = self._client.get_experiment(experiment_id)
        except MlflowException:
            return None
        return None if found.lifecycle_stage == DELETED else dict(found.tags)

    def version(self, name: str, version: str) -> FoundVersion | None:
        try:
            found = self._client.get_model_version(name, version)
            address = self._client.get_model_version_download_uri(name, version)
            place = model_location(self._client, address)
        except MlflowException:
            return None
        return FoundVersion(
            found.tags,
            found.run_id,
            found.source,
            found.description or "",
            self._hashed(place),
        )

    def aliases(self, name: str) -> Mapping[str, str]:
        return aliases(self._client, name)

    def orphans(self) -> list[str]:
        """Folders of an embedded store that belong to no run."""
        if not self._store.embedded:
            return []
        return [
            f"artifacts/{folder.parent.name}/{folder.name}"
            for folder in sorted(self._store.artifacts.glob("*/*"))
            if folder.name != "models" and folder.name not in self._runs
        ]

    def _ledger_run(self, run: Run) -> LedgerRun:
        with self._folder(run.info.artifact_uri) as folder:
            files = ledger_files(folder)
        return LedgerRun(self._snapshot(run, ()), run.info.lifecycle_stage == DELETED, files)

    def _snapshot(self, run: Run, metrics: Iterable[str]) -> Snapshot:
        info, run_id = run.info, run.info.run_id
        # Only here does a run say when a metric's latest value was logged.
        latest = {m.key: _point(m) for m in run.data._metric_objs}
        names = dict.fromkeys([*metrics, *latest])
        history = {
            n: [_point(m) for m in self._client.get_metric_history(run_id, n)] for n in names
        }
        return Snapshot(
            run_id,
            info.experiment_id,
            info.run_name,
            info.status,
            info.start_time,
            info.end_time,
            ours(run.data.tags),
            dict(run.data.params),
            {name: points for name, points in history.items() if points},
            [described_input(found) for found in run.inputs.dataset_inputs],
            self._hashed(info.artifact_uri),
            latest,
        )

    def _hashed(self, address: str) -> dict[str, str]:
        """SHA-256 of every file at an address, but for `EVIDENCE`."""
        with self._folder(address) as folder:
            found = digest_folder(folder)
        found.pop(EVIDENCE, None)
        return found

    @contextmanager
    def _folder(self, address: str, path: str = "") -> Iterator[Path]:
        """A folder of artifacts: the store's own, or a copy of it (of one file of it)."""
        if self._store.embedded:
            try:
                yield artifacts.folder_of(address, self._store.artifacts)
                return
            except ValueError:  # written by an MLflow client of somebody else
                pass
        with tempfile.TemporaryDirectory() as folder:
            repository = get_artifact_repository(address, self._store.tracking_uri)
            with suppress(MlflowException, OSError):  # an empty folder says that nothing is there
                repository.download_artifacts(path, folder)
            yield Path(folder)

    def _interrupted(self, sweep_id: str) -> bool:
        """Whether the spool knows a sweep, and not its end."""
        folder = SweepFolder(self._store.spool / sweep_id)
        return bool(sweep_id) and folder.path.is_dir() and not folder.result.exists()


def _point(metric: object) -> Point:
    return float(metric.value), int(metric.timestamp), int(metric.step)  # type: ignore[attr-defined]
