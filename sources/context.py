"""What a source may ask of its surroundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from halfstep.errors import UserError
from halfstep.examples import Examples

Pools = Mapping[str, Examples]
"""Examples by the names that splits are taken from."""


def _no_registry(address: str) -> AbstractContextManager[Path]:
    raise UserError(f"{address}: no MLflow store is at hand here")


@dataclass(frozen=True)
class Context:
    """Where caches lie, and who fetches what only the tracking store has."""

    cache: Path
    """A folder for what is made once: trained weights, prepared data."""
    fetch: Callable[[str], AbstractContextManager[Path]] = _no_registry
    """From an MLflow address (``models:/…``, ``runs:/…``) to a local folder or file, which is there
    while the context is open."""
