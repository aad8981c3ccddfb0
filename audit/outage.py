"""Outages: which failures of a tracking store pass by themselves, and how long to wait for that."""

from __future__ import annotations

import errno
import os
import sqlite3

from audit.environment import without_credentials
from halfstep.errors import UserError, first_line

VARIABLE = "HALFSTEP_PATIENCE"
PATIENCE = 300.0
_REFUSALS = frozenset(
    (
        "BAD_REQUEST",
        "CUSTOMER_UNAUTHORIZED",
        "INVALID_PARAMETER_VALUE",
        "NOT_IMPLEMENTED",
        "PERMISSION_DENIED",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
        "UNAUTHENTICATED",
    )
)
"""What MLflow answers to a request that it would refuse again."""
_HELD = frozenset((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED))
"""Somebody else writes, and will end. SQLite's other faults, a full disk first, do not pass."""
_LASTING = frozenset((errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EACCES))


def patience() -> float:
    """Seconds that an outage may last: ``HALFSTEP_PATIENCE``, five minutes by default.

    Raises:
        UserError: it is not a number of seconds.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else PATIENCE
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{VARIABLE} is {text!r}; it is a number of seconds, 0 or more")
    return seconds


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed later: no connection, a locked database, a server's own
    fault; not a refusal, a full disk, or an error of ours."""
    import requests
    import sqlalchemy
    from mlflow.exceptions import MlflowException

    if isinstance(error, UserError):
        return False
    fault = _sqlite_fault(error)
    if fault is not None:
        return fault.sqlite_errorcode & 0xFF in _HELD
    if isinstance(error, MlflowException):
        return error.error_code not in _REFUSALS
    if isinstance(error, requests.RequestException):
        return True
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return isinstance(error, sqlalchemy.exc.OperationalError)


def _sqlite_fault(error: BaseException) -> sqlite3.Error | None:
    """What SQLite itself said, where it did: SQLAlchemy wraps that, and MLflow wraps SQLAlchemy."""
    seen: BaseException | None = error
    while seen is not None:
        within = getattr(seen, "orig", seen)
        if isinstance(within, sqlite3.Error) and hasattr(within, "sqlite_errorcode"):
            return within
        seen = seen.__cause__
    return None


def first_words(error: BaseException) -> str:
    """The first line of what an error says, without passwords, cut to a length that reads."""
    text = without_credentials(first_line(error))
    return text if len(text) <= 200 else f"{text[:200]}…"
