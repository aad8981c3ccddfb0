"""Structured logs: one JSON document a line, with the ids of the sweep and the cell.

Whoever embeds halfstep attaches handlers to the logger ``halfstep`` instead; Prefect forwards it
with ``PREFECT_LOGGING_EXTRA_LOGGERS=halfstep``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from halfstep.errors import UserError, allowed

VARIABLE = "HALFSTEP_LOG"
TEXT, JSON = "text", "json"
LOGGER = logging.getLogger("halfstep")
LOGGER.addHandler(logging.NullHandler())  # silent until somebody asks
_FACTS = "halfstep"
_BOUND: ContextVar[dict[str, Any] | None] = ContextVar("bound", default=None)


@contextmanager
def bound(**facts: Any) -> Iterator[None]:
    """While open, every event holds these facts too."""
    token = _BOUND.set({**(_BOUND.get() or {}), **facts})
    try:
        yield
    finally:
        _BOUND.reset(token)


def log(event: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Logs an event: a name such as ``cell.finished``, and facts that are JSON."""
    LOGGER.log(level, event, extra={_FACTS: {**(_BOUND.get() or {}), **facts}})


class JsonLines(logging.Formatter):
    """Time, level, event and its facts."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": at,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, _FACTS, {}),
        }
        return json.dumps(line, ensure_ascii=False, default=str)


def as_json() -> bool:
    """Whether this process logs JSON lines: ``HALFSTEP_LOG=json``.

    Raises:
        UserError: the variable is neither ``text`` nor ``json``.
    """
    wanted = os.environ.get(VARIABLE, TEXT)
    if wanted not in (TEXT, JSON):
        raise UserError(f"{VARIABLE} is {wanted!r}; {allowed(wanted, [TEXT, JSON])}")
    return wanted == JSON


def to_standard_error() -> None:
    """Writes every event to standard error, once."""
    if not any(isinstance(h.formatter, JsonLines) for h in LOGGER.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
