"""The queue: pieces that lie in a depot until some worker takes them.

Nothing is locked. A worker claims a piece and renews the claim while it works; a claim that stands
still belongs to a dead worker, and another takes the piece. Should two do the same piece, both come
to the same bits, and one record stays.
"""

from __future__ import annotations

import pickle
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from halfstep.errors import UserError
from tasks.depot import Depot
from tasks.work import Done, Refused, Work, is_done, perform

QUEUE, CLAIMS, DONE, FAILED = "queue", "claims", "done", "failed"
RENEWED_EVERY = 5.0
STALE_AFTER = 30.0
"""Seconds, by the clock of whoever watches: no two clocks are compared."""
POLL, LONGEST_POLL = 0.2, 2.0
Say = Callable[[str], None]


def publish(
    depot: Depot, number: int, work: Work, attend: Callable[[], None] = lambda: None
) -> Callable[[Say], Done]:
    """Offers a piece to the workers; what it returns waits until one has done it.

    Args:
        attend: is called over and over while it waits.

    Raises:
        UserError: from the waiting: a worker refused the piece, and why.
    """
    name = f"{number:08d}-{work.key}"
    depot.remove(f"{FAILED}/{work.key}")
    depot.write(f"{QUEUE}/{name}", pickle.dumps(work))
    published = time.monotonic()

    def wait(say: Say) -> Done:
        told = False
        while not is_done(work, depot):
            failed = depot.read(f"{FAILED}/{work.key}")
            if failed is not None:
                raise UserError(failed.decode())
            waited = time.monotonic() - published
            if not told and waited > STALE_AFTER and depot.read(f"{CLAIMS}/{work.key}") is None:
                say(f"no worker has come for {work.name} yet; start one: "
                    f"halfstep work {depot.shown}")  # fmt: skip
                told = True
            attend()
            time.sleep(POLL)
        # What it cost is told a moment later; where it was done by a worker that died, never.
        told_by, deadline = None, time.monotonic() + 10 * POLL
        while told_by is None and time.monotonic() < deadline:
            told_by = depot.read(f"{DONE}/{work.key}")
        found: Done = pickle.loads(told_by) if told_by else Done("unknown", 0.0, 0.0, 0, 0)
        return found

    return wait


@dataclass
class Worker:
    """One process that takes pieces. What it has seen of others' claims is by its own clock."""

    depot: Depot
    name: str = field(default_factory=lambda: f"{platform.node()}-{uuid.uuid4().hex[:8]}")
    seen: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    def serve(self, idle: float | None, say: Say) -> int:
        """Takes pieces until there has been none for ``idle`` seconds (None: for ever); how many.

        Raises:
            UserError: this machine cannot take part: it runs other code, say.
        """
        done, last, pause = 0, time.monotonic(), POLL
        while True:
            name, work = next(self._free(), ("", None))
            if work is None:
                if idle is not None and time.monotonic() - last > idle:
                    return done
                time.sleep(pause)
                pause = min(1.5 * pause, LONGEST_POLL)
                continue
            pause = POLL
            say(work.name)
            self._do(name, work)
            done, last = done + 1, time.monotonic()

    def _do(self, name: str, work: Work) -> None:
        with self._claim(work.key):
            try:
                found = perform(work)
            except (Refused, OSError):  # this machine's fault: another may do it
                raise
            except Exception as error:  # whatever it is, each worker would meet it
                said = str(error) if isinstance(error, UserError) else f"{work.name}: {error!r}"
                self.depot.write(f"{FAILED}/{work.key}", said.encode())
            else:
                self.depot.write(f"{DONE}/{work.key}", pickle.dumps(found))
            self.depot.remove(f"{QUEUE}/{name}")

    def _free(self) -> Iterator[tuple[str, Work]]:
        """Pieces that nobody is at work on, each by its name in the queue. Every worker begins
        elsewhere: where all begin at the front, each reads the claims of all others first."""
        names = sorted(self.depot.names(QUEUE))
        start = random.randrange(len(names)) if names else 0
        for name in names[start:] + names[:start]:
            if self._claimed(name.rpartition("-")[2]):
                continue
            data = self.depot.read(f"{QUEUE}/{name}")
            if data is None:
                continue
            work: Work = pickle.loads(data)
            if is_done(work, self.depot):
                self.depot.remove(f"{QUEUE}/{name}")
            else:
                yield name, work

    def _claimed(self, key: str) -> bool:
        claim = self.depot.read(f"{CLAIMS}/{key}")
        if claim is None or claim.startswith(self.name.encode()):
            return False
        before, since = self.seen.get(key, (b"", 0.0))
        if claim != before:
            self.seen[key] = claim, time.monotonic()
            return True
        return time.monotonic() - since < STALE_AFTER

    @contextmanager
    def _claim(self, key: str) -> Iterator[None]:
        ended = threading.Event()

        def renew() -> None:
            number = 0
            while True:
                with suppress(UserError):  # the depot stays away: whoever works here will see it
                    self.depot.write(f"{CLAIMS}/{key}", f"{self.name} {number}".encode())
                number += 1
                if ended.wait(RENEWED_EVERY):
                    return

        thread = threading.Thread(target=renew, daemon=True)
        self.depot.write(f"{CLAIMS}/{key}", f"{self.name} -1".encode())
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.depot.remove(f"{CLAIMS}/{key}")
