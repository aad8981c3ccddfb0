"""The recorder: one background thread that projects finished records while the sweep goes on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.issuer import NOBODY, Issuer
from audit.outage import first_words, passes, patience
from audit.spool import Record
from audit.store import Store
from halfstep.errors import UserError

if TYPE_CHECKING:
    from audit.ledger import Entry
    from audit.trail import Trail

LONGEST_PAUSE = 10.0
BEAT = 15.0
DEAD_AFTER = 45.0
"""Seconds without a beat, by the clock of whoever watches."""
GRACE = 15.0
"""Seconds that a sweep which is told to stop may take to say so in the trail."""


def _unsaid(text: str) -> None:
    """Nobody listens."""


class Recorder:
    """Takes records in order. Importing mlflow, opening the store and writing all happen beside
    the useful work.

    While the store does not answer, or answers with a fault of its own, the records wait in the
    spool and are written in order once it does. What will not pass, or takes longer than
    `audit.outage.patience`, is raised by `check` and `wait`; the next run of the same command
    projects what the spool holds.
    """

    def __init__(
        self,
        store: Store,
        experiment: str,
        sweep_id: str,
        issuer: Issuer = NOBODY,
        say: Callable[[str], None] = _unsaid,
    ) -> None:
        self._store = store
        self._say = say
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="halfstep-recorder")
        self._futures: list[Future[None]] = []
        self._trail: Trail | None = None
        self._parent = ""
        self._stopping = threading.Event()
        self.run_ids: dict[str, str] = {}
        """Run id by record key."""
        self.experiment_id = ""
        self.cpu_seconds = 0.0
        """What recording cost this process, whichever thread it ran beside."""
        self._entered: Entry | None = None
        self._previous: dict[str, str] | None = None
        self.issuer = issuer
        self._submit(lambda: self._open(store, experiment, sweep_id))
        if not store.embedded:
            threading.Thread(target=self._beat, daemon=True).start()

    def sweep(self, record: Record, folder: Path, splits: Sequence[Mapping[str, Any]]) -> None:
        """The parent run. Comes first."""

        def project(trail: Trail) -> None:
            # Nothing is written to a run before it is known that nobody else writes to it.
            self._parent = claimed = trail.begin(record)
            self._claim(trail, record.identity)
            self._parent = trail.run(record, folder)
            if self._parent != claimed and not self._store.embedded:
                trail.beat(self._parent, self._store.writer())
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

    def decided(self) -> bytes | None:
        """The result of this sweep, where it was entered in the ledger before, by whichever
        machine."""
        self._futures[0].exception()
        found: list[bytes] = []

        def look(trail: Trail) -> None:
            if self._entered is not None:
                found.append(trail.stored(self._entered.body["what"]["run_id"], "sweep.json"))

        self._submit(lambda: look(self._opened))
        self.wait()
        return found[0] if found else None

    def stored(self, name: str) -> bytes:
        """An artifact of the parent's run, as the tracking store holds it."""
        found: list[bytes] = []
        self.call(lambda trail, parent_id, _: found.append(trail.stored(parent_id, name)))
        self.wait()
        return found[0]

    def check(self) -> None:
        """Raises what `wait` would raise, of what has been written so far."""
        for future in self._futures:
            if future.done():
                self._raise(future)

    def wait(self) -> None:
        """Returns when everything is recorded.

        Raises:
            UserError: the tracking store failed; says that nothing is lost.
        """
        for future in self._futures:
            self._raise(future)

    def suspend(self, note: str) -> None:
        """Says in the trail that the sweep was told to stop, as far as that is soon done."""
        self._stopping.set()

        def act() -> None:
            if self._parent and self._trail is not None:
                self._trail.suspend(self._parent, note)

        self._submit(act)
        wait(self._futures, GRACE)

    def close(self) -> None:
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _raise(self, future: Future[None]) -> None:
        try:
            future.result()
        except (UserError, OSError):
            raise
        except Exception as error:  # whatever the store's own libraries raise
            raise UserError(
                f"the sweep could not be recorded in {self._store.shown_uri} "
                f"({first_words(error)}). All that was run is kept in {self._store.spool}; run the "
                "same command again to record it"
            ) from error

    def _claim(self, trail: Trail, key: str) -> None:
        """Makes this the one process that writes the sweep to a server. On an embedded store the
        lock of the store does.

        Raises:
            UserError: another machine is at it.
        """
        if self._store.embedded:
            return
        from audit.trail import written_elsewhere

        writer = self._store.writer()
        other = trail.claim(self._parent, key, writer)
        if other is None:
            return
        deadline = time.monotonic() + DEAD_AFTER
        while time.monotonic() < deadline and not self._stopping.wait(1.0):
            mark = trail.marked(self._parent)
            if mark != other:
                if mark is None:
                    break
                raise written_elsewhere(self._store, json.loads(mark)["host"])
        trail.beat(self._parent, writer)

    def _beat(self) -> None:
        while not self._stopping.wait(BEAT):
            trail = self._trail
            if trail is not None and trail.claimed and self._futures[-1].done():
                with contextlib.suppress(Exception):  # an outage is the recorder's own to notice
                    trail.beat(trail.claimed, self._store.writer())

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
                self._persist(act)
            finally:
                self.cpu_seconds += time.thread_time() - before

        self._futures.append(self._pool.submit(timed))

    def _persist(self, act: Callable[[], None]) -> None:
        """Does it, and again while the store is out."""
        pause, deadline = 0.5, 0.0
        while True:
            try:
                if deadline and self._trail is not None:
                    self._trail.renew()
                act()
            except Exception as error:
                now = time.monotonic()
                if not deadline:
                    deadline = now + patience()
                    if passes(error):
                        self._say(
                            f"{self._store.shown_uri} cannot be written ({first_words(error)}); "
                            f"records wait in {self._store.spool} and are written once it can"
                        )
                if not passes(error) or now >= deadline or self._stopping.wait(pause):
                    raise
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if deadline:
                    self._say(f"{self._store.shown_uri} can be written again")
                return
