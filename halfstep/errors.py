"""The one exception that means: the user's input is at fault, and this sentence says how."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad config, model, data or arguments. Shown as one message, exit code 2, no traceback."""


class Tampered(UserError):
    """The evidence is not as it was recorded. Exit code 4."""


class NotComparable(UserError):
    """Two results under different protocols. Exit code 5."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def allowed(value: object, choices: Iterable[str]) -> str:
    """The tail of a message about a wrong name: what is allowed, and the nearest match.

    >>> allowed("int9", ["int4", "int8"])
    "allowed: int4, int8 (did you mean 'int8'?)"
    """
    names = list(choices)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"allowed: {', '.join(names)}{hint}"
