"""The commands of auditors and boards."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.options import (
    DEFAULT_STORE,
    DIFFERS,
    TAMPERED,
    Author,
    Comment,
    Json,
    Key,
    Name,
    Role,
    StoreOption,
    emit,
    existing,
)
from halfstep.errors import UserError


def verify(
    run: Annotated[
        str, typer.Argument(help="A sweep, a run, or the folder of an evidence pack; else all.")
    ] = "",
    trust: Annotated[
        list[Path] | None,
        typer.Option(help="Public key, or a folder of them: signatures by others do not count."),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="NUMBER:SHA256, or a file of them: written down before."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Recomputes every digest and the ledger; names each item that was changed. Exit code 4."""
    from audit.signing import trusted_keys
    from flows.show_audit import print_report

    keys, heads = trusted_keys(trust or []), _heads(head or [])
    if run and Path(run).is_dir():
        from audit.pack import verify_pack

        report = verify_pack(Path(run), keys, heads)
    else:
        from audit.lookup import sweep_run
        from audit.reading import TrackingStore
        from audit.verify import verify as check

        found = existing(store)
        only = sweep_run(found, run) if run else None
        report = check(TrackingStore(found), only, keys, heads)
    emit(report.to_json(), as_json, print_report)
    if report.findings:
        raise typer.Exit(TAMPERED)


def compare(
    first: Annotated[str, typer.Argument(help="A sweep, or a cell's run.")],
    second: Annotated[str, typer.Argument(help="Another of its kind.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Two cells or two sweeps side by side; exit code 5 where their protocols differ."""
    from flows.compare import compare as side_by_side
    from flows.show_audit import print_comparison

    emit(side_by_side(existing(store), first, second), as_json, print_comparison)


def reproduce(
    run: Annotated[
        str, typer.Argument(help="A sweep, or a cell's run; else the newest sweep.")
    ] = "",
    keep: Annotated[Path | None, typer.Option(help="Keep what was run in this new folder.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Enter the outcome in the ledger.")
    ] = False,
    author: Author = "",
    key: Key = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Runs it again from what was recorded, and compares; exit code 6 where it differs."""
    from audit.issuer import issuer
    from flows.entering import enter_reproduction
    from flows.reproduce import REPRODUCED
    from flows.reproduce import reproduce as again
    from flows.show import progress_bar
    from flows.show_audit import print_entry, print_reproduction

    found, by = existing(store), issuer(author, key)
    with progress_bar():
        outcome = again(found, run, keep)
    emit(outcome, as_json, print_reproduction)
    if record:
        with found.writing("recording a reproduction"):
            entry = enter_reproduction(found, outcome, by)
        if not as_json:
            print_entry(dict(entry.body) | {"digest": entry.digest})
    if outcome["status"] not in REPRODUCED:
        raise typer.Exit(DIFFERS)


def review(
    sweep: Annotated[
        str, typer.Argument(help="Sweep id, its start, or its run; else the newest.")
    ] = "",
    approve: Annotated[bool, typer.Option("--approve", help="It may be deployed.")] = False,
    refuse: Annotated[bool, typer.Option("--refuse", help="It may not.")] = False,
    condition: Annotated[
        list[str] | None, typer.Option(help="Under which it may; may be given again.")
    ] = None,
    waive: Annotated[
        list[str] | None,
        typer.Option(help="'METRIC: REASON' of a criterion that need not hold; or 'expiry: …'."),
    ] = None,
    until: Annotated[
        str, typer.Option(help="Last day, YYYY-MM-DD; by default the decision's.")
    ] = "",
    name: Name = "",
    role: Role = "",
    comment: Comment = "",
    key: Key = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve reviews as a Prefect deployment instead.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Shows a decision for sign-off; approves or refuses it, and moves the model's aliases."""
    if serve:
        from flows.review import serve_reviews

        serve_reviews(existing(store))
        return
    from audit.review import OUTCOMES, Review, open_case, read_waivers
    from audit.review import review as enter
    from audit.signing import signer
    from flows.show_audit import print_case, print_entry

    found = existing(store)
    if approve and refuse:
        raise UserError("review: --approve and --refuse exclude each other")
    conditions = tuple(condition or ())
    if not (approve or refuse):
        case = open_case(found, sweep)
        if as_json or not sys.stdin.isatty():
            emit(_case_json(case), as_json, print_case)
            return
        print_case(_case_json(case))
        sweep = case.what["sweep_id"]
        outcome, name, role, comment, conditions = _asked(name, role, comment, conditions)
    else:
        outcome = OUTCOMES[2] if refuse else OUTCOMES[1] if conditions else OUTCOMES[0]
    said = Review(outcome, name, role, comment, conditions, read_waivers(waive or ()), _date(until))
    said.check()
    with found.writing(f"review of {sweep or 'the newest sweep'}"):
        entry = enter(found, sweep, said, signer(key))
    emit(dict(entry.body) | {"digest": entry.digest}, as_json, print_entry)


def rollback(
    subject: Annotated[str, typer.Argument(help="Name of the registered model.")],
    name: Name = "",
    role: Role = "",
    comment: Comment = "",
    key: Key = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Makes the previous champion of a model the champion again."""
    from audit.review import rollback as enter
    from audit.signing import signer
    from flows.show_audit import print_entry

    found = existing(store)
    with found.writing(f"rollback of {subject}"):
        entry = enter(found, subject, name, role, comment, signer(key))
    emit(dict(entry.body) | {"digest": entry.digest}, as_json, print_entry)


def export(
    sweep: Annotated[str, typer.Argument(help="Sweep id, its start, or its run.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    key: Key = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Writes the evidence pack: it verifies on a machine without the store."""
    from audit.pack import export as write
    from audit.signing import signer
    from flows.show_audit import print_pack

    emit(write(existing(store), sweep, folder, signer(key)), as_json, print_pack)


def keygen(
    file: Annotated[Path, typer.Argument(help="Where the private key goes.")],
) -> None:
    """Makes an Ed25519 key to sign with; HALFSTEP_SIGNING_PASSWORD encrypts it."""
    import os

    from audit.signing import PASSWORD_VARIABLE, make_key

    public = make_key(file, os.environ.get(PASSWORD_VARIABLE))
    print(f"{file}: private key, keep it to yourself\n{public}: public key, for `verify --trust`")


def _heads(texts: list[str]) -> list[tuple[int, tuple[str, ...]]]:
    from audit.ledger import read_head

    lines = [
        line
        for text in texts
        for line in (Path(text).read_text().splitlines() if Path(text).is_file() else [text])
        if line.strip()
    ]
    try:
        return [read_head(line) for line in lines]
    except ValueError as error:
        raise UserError(f"--head: {error}") from error


def _date(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError as error:
        raise UserError(f"--until: {text!r} is not a day of the form YYYY-MM-DD") from error


def _asked(
    name: str, role: str, comment: str, conditions: tuple[str, ...]
) -> tuple[str, str, str, str, tuple[str, ...]]:
    """What was not given as an option, asked on the terminal."""
    from rich.prompt import Prompt

    from audit.review import CONDITIONALLY, OUTCOMES

    outcome = Prompt.ask("outcome", choices=list(OUTCOMES))
    if outcome == CONDITIONALLY and not conditions:
        conditions = (Prompt.ask("condition"),)
    name = name or Prompt.ask("your name")
    role = role or Prompt.ask("your role")
    return outcome, name, role, comment or Prompt.ask("why"), conditions


def _case_json(case: Any) -> dict[str, Any]:
    return {
        "sweep_id": case.what["sweep_id"],
        "run_id": case.what["run_id"],
        "experiment_id": case.result["experiment_id"],
        "verdict": case.what["verdict"],
        "summary": case.result["decision"]["summary"],
        "candidate": case.what["candidate"],
        "author": case.what["author"],
        "expires": case.what["expires"],
        "model": case.what["model"],
        "not_passed": case.failed,
        "confirmation": [
            finding["reason"]
            for cell in case.result["confirmation"]
            for finding in cell["findings"]
        ],
        "reviews": [one.body["what"] for one in case.reviews],
    }
