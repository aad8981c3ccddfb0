"""The recorder: one background thread that projects finished records while the sweep goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.environment import without_credentials
from audit.issuer import NOBODY, Issuer
from audit.spool import Record
from audit.store import Store
from halfstep.errors import UserError

if TYPE_CHECKING:
    from audit.ledger import Entry
    from audit.trail import Trail


class Recorder:
    """Takes records in order. Importing mlflow, opening the store and writing all happen beside
    the useful work; an error is kept and raised by `wait`, so that it stops no cell: the records
    stay in the spool and are projected by the next run of the same command."""

    def __init__(
        self, store: Store, experiment: str, sweep_id: str, issuer: Issuer = NOBODY
    ) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="halfstep-recorder")
        self._futures: list[Future[None]] = []
        self._trail: Trail | None = None
        self._parent = ""
        self.run_ids: dict[str, str] = {}
        """Run id by record key."""
        self.experiment_id = ""
        self.cpu_seconds = 0.0
        """What recording cost this process, whichever thread it ran beside."""
        self._entered: Entry | None = None
        self._previous: dict[str, str] | None = None
        self.issuer = issuer
        self._submit(lambda: self._open(store, experiment, sweep_id))

    def sweep(self, record: Record, folder: Path, splits: Sequence[Mapping[str, Any]]) -> None:
        """The parent run. Comes first."""

        def project(trail: Trail) -> None:
            self._parent = trail.run(record, folder)
            trail.datasets(self._parent, splits)
            self.run_ids[record.key] = self._parent

        self._submit(lambda: project(self._opened))

    def child(self, record: Record, folder: Path) -> None:
        """A reference, calibration, cell or confirmation run."""

        def project(trail: Trail) -> None:
            self.run_ids[record.key] = trail.run(record, folder, self._parent)

        self._submit(lambda: project(self._opened))

    def call(self, act: Callable[[Trail, str, Mapping[str, str]], None]) -> None:
        """Something on the trail that needs the parent's run id and those of the records so far."""
        self._submit(lambda: act(self._opened, self._parent, self.run_ids))

    @property
    def previous(self) -> dict[str, str] | None:
        """The experiment's decision before this sweep; None where there is none, or where the
        tracking store cannot be asked (`wait` says why)."""
        with contextlib.suppress(Exception):
            self._futures[0].result()
        return self._previous

    @property
    def entered(self) -> Entry | None:
        """This sweep's entry in the ledger, where an interrupted run of it came that far."""
        return self._entered

    def stored(self, name: str) -> bytes:
        """An artifact of the parent's run, as the tracking store holds it."""
        found: list[bytes] = []
        self.call(lambda trail, parent_id, _: found.append(trail.stored(parent_id, name)))
        self.wait()
        return found[0]

    def wait(self) -> None:
        """Returns when everything is recorded.

        Raises:
            UserError: the tracking store failed; says that nothing is lost.
        """
        for future in self._futures:
            try:
                future.result()
            except (UserError, OSError):
                raise
            except Exception as error:  # whatever the store's own libraries raise
                first = without_credentials((str(error) or type(error).__name__).splitlines()[0])
                raise UserError(
                    f"the sweep could not be recorded in {self._store.shown_uri} ({first}). All "
                    f"that was run is kept in {self._store.spool}; run the same command again to "
                    "record it"
                ) from error

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _opened(self) -> Trail:
        assert self._trail is not None
        return self._trail

    def _open(self, store: Store, experiment: str, sweep_id: str) -> None:
        import audit.report  # noqa: F401  (matplotlib: a third of a second, better paid here)
        from audit.trail import Trail

        self._trail = Trail(store, experiment, sweep_id, self.issuer.signer)
        self.experiment_id = self._trail.experiment_id
        self._previous = self._trail.latest_decision()
        self._entered = self._trail.entered()

    def _submit(self, act: Callable[[], None]) -> None:
        def timed() -> None:
            for earlier in self._futures:
                if earlier.done() and earlier.exception():
                    return  # after an error nothing more is written: order is kept for the replay
            before = time.thread_time()
            try:
                act()
            finally:
                self.cpu_seconds += time.thread_time() - before

        self._futures.append(self._pool.submit(timed))
