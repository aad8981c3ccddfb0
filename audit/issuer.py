"""Who answers for what is recorded: a declared name, and the key that signs."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from audit.signing import Signer

AUTHOR_VARIABLE = "HALFSTEP_AUTHOR"


@dataclass(frozen=True)
class Issuer:
    """A declared identity. Nothing proves a name; a signature proves the possession of a key."""

    name: str
    signer: Signer | None = None


NOBODY = Issuer("not declared")


def issuer(name: str | None, key: Path | None) -> Issuer:
    """The name given, else that in `AUTHOR_VARIABLE`, else the account's.

    Raises:
        UserError: the key cannot be used.
    """
    declared = name or os.environ.get(AUTHOR_VARIABLE) or _account()
    signer = None
    if key is not None or os.environ.get("HALFSTEP_SIGNING_KEY"):
        from audit.signing import signer as read_signer

        signer = read_signer(key)
    return Issuer(" ".join(declared.split()), signer)


def same_person(one: str, other: str) -> bool:
    """Whether two declared names are the same, however they are written."""
    return " ".join(one.split()).casefold() == " ".join(other.split()).casefold()


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as containers have
        return NOBODY.name
