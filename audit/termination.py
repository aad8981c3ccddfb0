"""Being told to stop: what is half written is finished first, then the work ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM: somebody ends this process in good order."""


class _State(threading.local):
    """Signals come to the main thread only."""

    depth = 0
    pending = False


_STATE = _State()


@contextmanager
def finishing() -> Iterator[None]:
    """While open, a SIGTERM waits."""
    _STATE.depth += 1
    try:
        yield
    finally:
        _STATE.depth -= 1
        if _STATE.pending and not _STATE.depth:
            _STATE.pending = False
            raise Terminated


def listen() -> None:
    """From now on SIGTERM raises `Terminated` in the main thread."""

    def heard(number: int, frame: FrameType | None) -> None:
        if _STATE.depth:
            _STATE.pending = True
        else:
            raise Terminated

    signal.signal(signal.SIGTERM, heard)
