"""Plug-ins: what other installed packages add to a table of names, through entry points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from halfstep.digest import digest_code
from halfstep.errors import UserError

T = TypeVar("T")


class Known(Mapping[str, T], Generic[T]):
    """Our own values by name, and those that entry points of a group add.

    Other packages are looked for only when a name is not ours, and imported only when theirs is
    asked for. A name of ours cannot be taken.
    """

    def __init__(self, own: Mapping[str, T], group: str, kind: Any) -> None:
        """``kind``: what a plug-in's value must be, or be a subclass of."""
        self._own, self._group, self._kind = dict(own), group, kind

    @cached_property
    def _others(self) -> dict[str, EntryPoint]:
        return {p.name: p for p in entry_points(group=self._group) if p.name not in self._own}

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        found = self._others[name]
        where = f"plug-in {name!r} of {_origin(found)}"
        try:
            value = found.load()
        except Exception as error:  # whatever another package raises while it is imported
            raise UserError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
        fits = issubclass if isinstance(value, type) else isinstance
        if not fits(value, self._kind):
            what = getattr(self._kind, "__name__", str(self._kind))
            raise UserError(f"{where} is not of the kind that {self._group} takes: {what}")
        return value  # type: ignore[no-any-return]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._others

    def __iter__(self) -> Iterator[str]:
        return iter({**self._own, **self._others})

    def __len__(self) -> int:
        return len(self._own) + len(self._others)

    def origin(self, name: str) -> str | None:
        """Which package a name comes from, with its version and the digest of its code; None where
        the name is ours."""
        if name in self._own:
            return None
        found = self._others[name]
        value = found.load()
        file = getattr(__import__(found.module, fromlist=["_"]), "__file__", None)
        code = digest_code([Path(file).parent])[:16] if file else "unknown"
        return f"{_origin(found)} {getattr(value, '__name__', name)} sha256:{code}"


def _origin(found: EntryPoint) -> str:
    return f"{found.dist.name} {found.dist.version}" if found.dist else found.value
