"""What the commands share: arguments, and how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfstep.errors import Tampered, UserError

if TYPE_CHECKING:
    from audit.store import Store

BAD_INPUT, NOT_ACCEPTED, TAMPERED, NOT_COMPARABLE, DIFFERS = 2, 3, 4, 5, 6
BY_SIGNAL = 128
"""And the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""

Config = Annotated[Path, typer.Argument(help="A YAML file, see configs/.")]
StoreOption = Annotated[
    Path,
    typer.Option("--store", envvar="HALFSTEP_STORE", help="Folder of the embedded store."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Author = Annotated[
    str,
    typer.Option(
        "--author", envvar="HALFSTEP_AUTHOR", help="Who answers for it; the account by default."
    ),
]
Key = Annotated[
    Path | None,
    typer.Option("--key", envvar="HALFSTEP_SIGNING_KEY", help="Ed25519 private key that signs."),
]
RunnerOption = Annotated[
    str,
    typer.Option(
        "--runner",
        envvar="HALFSTEP_RUNNER",
        help="Who evaluates: local, dask, ray, prefect, queue.",
    ),
]
Address = Annotated[
    str,
    typer.Option(
        envvar="HALFSTEP_RUNNER_ADDRESS",
        help="Of a Dask scheduler or Ray cluster; else one is made on this machine.",
    ),
]
Workers = Annotated[int, typer.Option(help="How many, or how many are expected.")]
DepotOption = Annotated[
    str,
    typer.Option(
        "--depot",
        envvar="HALFSTEP_DEPOT",
        help="What all workers reach: a folder, or s3://BUCKET/PATH; else one in the store.",
    ),
]
Name = Annotated[str, typer.Option(help="Who decides.")]
Role = Annotated[str, typer.Option(help="As what.")]
Comment = Annotated[str, typer.Option(help="Why.")]
DEFAULT_STORE = Path("mlruns")


def existing(store: Path) -> Store:
    """A store that holds something.

    Raises:
        UserError: it does not.
    """
    from audit.store import Store

    found = Store(store)
    if found.embedded and not found.database.exists():
        if found.witness.exists():
            raise Tampered(
                f"store {store}: the database {found.database.name} is gone, but "
                f"{found.witness.name} names what was recorded in it; restore it from a backup"
            )
        raise UserError(
            f"store {store} holds no recorded sweep yet; make one with: halfstep sweep CONFIG"
        )
    return found


def emit(value: Any, as_json: bool, pretty: Callable[[Any], None]) -> None:
    """For programs, or for people."""
    if as_json:
        json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        pretty(value)
