"""The commands of whoever keeps the store: backup, and what may go."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.options import (
    DEFAULT_STORE,
    TAMPERED,
    Author,
    Comment,
    Json,
    Key,
    StoreOption,
    emit,
    existing,
)
from halfstep.errors import UserError


def backup(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Copies an embedded store, as it is at one moment, and verifies the copy."""
    from audit.backup import backup as copy
    from flows.show import say

    found = existing(store)
    with found.writing("backup"):
        made = copy(found, folder)

    def told(made: dict[str, Any]) -> None:
        say(f"{made['folder']}: {made['bytes'] / 2**20:.1f} MiB, {made['entries']} ledger entries, "
            f"{made['runs']} runs verified, {len(made['findings'])} finding(s)")  # fmt: skip
        for finding in made["findings"]:
            say(f"  {finding['where']}: {finding['what']}", style="red")
        say(f"to restore: use it as the store (--store {made['folder']}), wherever it lies")

    emit(made, as_json, told)
    if made["findings"]:
        raise typer.Exit(TAMPERED)


def prune(
    older_than: Annotated[int, typer.Option(help="Days.", min=0)] = 365,
    runs: Annotated[
        bool, typer.Option("--runs", help="Also the runs of cells, as an entry of the ledger.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else it is only shown.")] = False,
    comment: Comment = "",
    author: Author = "",
    key: Key = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Shows what may go, and why the rest stays: never what a decision that holds still needs."""
    from audit import retention
    from audit.issuer import issuer

    found = existing(store)
    if runs and apply and not comment:
        raise UserError("prune --runs --apply needs --comment: why they go is kept in the ledger")
    # What is still needed is asked while nobody else writes, lest it change before it is acted on.
    with found.writing("prune") if apply else nullcontext():
        spool = retention.spool_to_clear(found, older_than, time.time())
        held = retention.standing(found, older_than, datetime.now(UTC).date()) if runs else []
        if apply and runs:
            retention.finish_retiring(found)
            for one in held:
                if not one.reasons:
                    retention.retire(found, one, comment, issuer(author, key))
        if apply:
            retention.clear_spool(found, list(spool))
    shown = {
        "applied": apply,
        "spool": spool,
        "sweeps": [one.to_json() for one in held],
    }
    emit(shown, as_json, _print_pruned)


def _print_pruned(found: dict[str, Any]) -> None:
    from flows.show import say, table

    size = sum(found["spool"].values()) / 2**20
    done = "cleared" if found["applied"] else "may go"
    say(f"spool: {len(found['spool'])} finished sweep(s), {size:.1f} MiB: {done}")
    if found["sweeps"]:
        table(
            ["sweep", "decided", "runs", "stays because"],
            [
                [one["sweep_id"], one["decided"], str(one["runs"]),
                 "; ".join(one["kept_because"])
                 or ("retired" if found["applied"] else "nothing: may go")]
                for one in found["sweeps"]
            ],
        )  # fmt: skip
    if not found["applied"]:
        say("nothing was changed; --apply does it")
