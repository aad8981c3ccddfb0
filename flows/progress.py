"""Progress: how a running flow tells the terminal where it is, neither knowing the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Reporter:
    """Where progress goes. The default says nothing."""

    expect: Callable[[int], None] = lambda examples: None
    """How many examples all passes together will see."""
    advance: Callable[[int], None] = lambda examples: None
    say: Callable[[str], None] = lambda text: None
    """What is being done now."""
    warn: Callable[[str], None] = lambda text: None
    """What somebody should know."""


_SILENT = Reporter()
_CURRENT: ContextVar[Reporter] = ContextVar("reporter", default=_SILENT)


def reporter() -> Reporter:
    return _CURRENT.get()


@contextmanager
def reporting(to: Reporter) -> Iterator[None]:
    token = _CURRENT.set(to)
    try:
        yield
    finally:
        _CURRENT.reset(token)
