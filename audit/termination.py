"""Being told to stop: what is half written is finished first, then the work ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Somebody ends this process in good order, by Ctrl-C or SIGTERM. No `KeyboardInterrupt`: the
    libraries of command lines swallow that."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        """Of the signal."""


class _State(threading.local):
    """Signals come to the main thread only."""

    depth = 0
    pending: int | None = None


_STATE = _State()


@contextmanager
def finishing() -> Iterator[None]:
    """While open, a signal waits."""
    _STATE.depth += 1
    try:
        yield
    finally:
        _STATE.depth -= 1
        if _STATE.pending is not None and not _STATE.depth:
            number, _STATE.pending = _STATE.pending, None
            raise Stopped(number)


def listen() -> None:
    """From now on SIGINT and SIGTERM raise `Stopped` in the main thread."""

    def heard(number: int, frame: FrameType | None) -> None:
        if _STATE.depth:
            _STATE.pending = number
        else:
            raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, heard)
