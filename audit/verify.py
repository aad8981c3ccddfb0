"""Verify: recomputes every digest and the chain, and names each item that was changed.

It reads a `Source`: a tracking store (`audit.reading`) or an evidence pack (`audit.pack`). What it
cannot see: a store that was rewritten as a whole, ledger, head and witness with it, by someone who
recomputed every digest. A signature that the rewriter cannot make, or a head that was written down
elsewhere, shows that too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from securesystemslib.signer import Key

from audit import ledger, signing
from audit.evidence import EVIDENCE, NOTE, PREFIX, Snapshot, differences, read_evidence
from audit.ledger import (
    ALIASES,
    ANALYSIS,
    CHAMPION,
    DECISION,
    ENTRY,
    ENVELOPE,
    PUBLIC_KEY,
    RETIREMENT,
    Entry,
    Settings,
    in_order,
)
from halfstep.digest import digest_bytes, digest_json
from halfstep.errors import Tampered

FINISHED = "FINISHED"
RECORDED = (DECISION, ANALYSIS)
"""The entries that vouch for a run and its children."""
OWN_EXPERIMENT_TAGS = (PREFIX + "experiment", PREFIX + "head")


@dataclass(frozen=True)
class LedgerRun:
    """A run of the ledger's experiment."""

    snapshot: Snapshot
    deleted: bool
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class SweepRun:
    """The run of a sweep, or of an analysis that stands by itself."""

    run_id: str
    name: str
    status: str
    deleted: bool
    interrupted: bool
    """What is known beside the store says that it did not come to its end."""


@dataclass(frozen=True)
class FoundVersion:
    """A registered model version."""

    tags: Mapping[str, str]
    run_id: str | None
    source: str
    description: str
    files: Mapping[str, str]
    """SHA-256 by path."""


class Source(Protocol):
    """What is verified. Methods that a source has no answer to return None."""

    def ledger(self) -> list[LedgerRun]: ...
    def head(self) -> Sequence[str] | None:
        """Raises ValueError where what is named is no head."""
        ...

    def witness(self) -> Mapping[str, int] | None:
        """Raises ValueError where it holds something else."""
        ...

    def snapshot(self, run_id: str, metrics: Iterable[str]) -> Snapshot | None:
        """A run that is there and not deleted."""
        ...

    def artifact(self, run_id: str, path: str) -> bytes | None: ...
    def sweeps(self) -> list[SweepRun] | None: ...
    def children(self, run_id: str) -> list[str] | None: ...
    def experiment_tags(self, experiment_id: str) -> Mapping[str, str] | None: ...
    def version(self, name: str, version: str) -> FoundVersion | None: ...
    def aliases(self, name: str) -> Mapping[str, str] | None: ...
    def orphans(self) -> list[str]: ...

    complete: bool
    """False for a pack: it holds one sweep, not the whole store."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was recorded."""

    where: str
    what: str

    def to_json(self) -> dict[str, str]:
        return {"where": self.where, "what": self.what}


@dataclass
class Report:
    """What was found."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    runs: int = 0
    items: int = 0
    """Params, metrics, tags, datasets and artifacts that were compared."""
    head: str | None = None
    signed: dict[str, list[int]] = field(default_factory=dict)
    """Numbers of entries by the id of the key that signed them; under ``""`` the unsigned."""

    def add(self, where: str, faults: Iterable[str]) -> None:
        self.findings += [Finding(where, what) for what in faults]

    def to_json(self) -> dict[str, Any]:
        return {
            "intact": not self.findings,
            "findings": [finding.to_json() for finding in self.findings],
            "notes": self.notes,
            "entries": self.entries,
            "runs": self.runs,
            "items": self.items,
            "head": self.head,
            "signed": {key: numbers for key, numbers in self.signed.items() if key},
            "unsigned": self.signed.get("", []),
        }


def verify(
    source: Source,
    only: str | None = None,
    trusted: Sequence[Key] = (),
    known_heads: Sequence[tuple[int, tuple[str, ...]]] = (),
) -> Report:
    """Checks the ledger, and everything that it vouches for.

    Args:
        only: the run of one sweep; by default all of them, and what belongs to none.
        trusted: public keys. Where there are any, each entry must be signed by one of them, or be
            followed by one that is.
        known_heads: ends of the chain that were written down before.
    """
    report = Report()
    head, witness = _read(source.head, report), _read(source.witness, report)
    entries, pending = _read_ledger(source, report, {*(head or ())}, {*(witness or ())})
    _check_chain(report, entries, head, witness, known_heads)
    if witness is None and entries and source.complete:
        report.notes.append(
            "this store has no witness of what was appended from here: a database that was "
            "replaced by an older copy shows only against a head that was written down (--head)"
        )
    _check_signatures(source, report, entries, trusted)
    expected = ledger.replay(entries)
    chosen = [
        one
        for one in entries
        if one.kind in RECORDED and only in (None, one.body["what"].get("run_id"))
    ]
    retired = retired_runs(entries)
    for one in chosen:
        _check_recorded(source, report, one, expected, pending, retired)
    late = ledger.replay(pending)
    for key, version in expected.versions.items():
        if only in (None, version.get("run_id")):
            _check_version(source, report, key, version, late)
    if only is None:
        _check_settings(source, report, expected, late)
        _check_unentered(source, report, entries)
        for folder in source.orphans():
            report.add(folder, ["the database knows no run of this folder of artifacts"])
    _note_expired(report, entries, expected)
    return report


def require_intact(source: Source, run_id: str, doing: str) -> None:
    """Raises Tampered where a sweep is not as it was recorded; ``doing`` names what that stops."""
    faults = verify(source, run_id).findings
    if faults:
        raise Tampered(
            f"{doing}: the evidence is not as it was recorded ({faults[0].where}: "
            f"{faults[0].what}); `halfstep verify` names everything"
        )


def ledger_files(folder: Path) -> dict[str, bytes]:
    """What an entry's run keeps, from the folder of its artifacts."""
    names = (ENTRY, ENVELOPE, PUBLIC_KEY)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def finished_entries(source: Source) -> list[Entry]:
    """The finished entries in their order.

    Raises:
        Tampered: one cannot be read.
    """
    found = []
    for run in source.ledger():
        if run.snapshot.status == FINISHED and not run.deleted:
            try:
                found.append(ledger.read_entry(run.files[ENTRY]))
            except (KeyError, ValueError) as error:
                raise Tampered(
                    f"ledger run {run.snapshot.run_id} holds no entry ({error}); `halfstep "
                    "verify` says more"
                ) from error
    return in_order(found)


def retired_runs(entries: Iterable[Entry]) -> dict[str, str]:
    """The digest of the evidence of every run that was retired, by its id."""
    return {
        run: digest
        for one in entries
        if one.kind == RETIREMENT
        for run, digest in one.body["what"]["runs"].items()
    }


T = TypeVar("T")


def _read(what: Callable[[], T | None], report: Report) -> T | None:
    """What a source says, or None where it cannot be read: that is a finding."""
    try:
        return what()
    except ValueError as error:
        report.add("ledger", [str(error)])
        return None


def _read_ledger(
    source: Source, report: Report, head: set[str], witness: set[str]
) -> tuple[list[Entry], list[Entry]]:
    """The entries in their order, and those that were begun and not finished."""
    found = []
    for run in source.ledger():
        try:
            found.append((run, ledger.read_entry(run.files[ENTRY])))
        except (KeyError, ValueError):
            if run.snapshot.status == FINISHED and not run.deleted:
                where = f"ledger run {run.snapshot.name!r} ({run.snapshot.run_id})"
                report.add(where, [f"artifact {ENTRY} is gone or was changed"])
    # What others follow, or was seen finished, was finished once, whatever its run says now.
    over = witness | {digest for _, one in found for digest in one.previous}
    closing = {one.digest for run, one in found if run.snapshot.status == "RUNNING"} - over
    known = head | over
    entries, pending, runs = [], [], {}
    for run, one in found:
        if run.deleted and (run.snapshot.status == FINISHED or one.digest in known):
            where = f"ledger run {run.snapshot.name!r} ({run.snapshot.run_id})"
            report.add(where, ["the run was deleted"])
        elif run.snapshot.status == FINISHED or one.digest in known:
            entries.append(one)
            runs[one.digest] = run
            if one.digest in closing:
                report.notes.append(
                    f"entry {one.name} was entered and not closed: run its command again"
                )
        elif not run.deleted:
            pending.append(one)
            report.notes.append(
                f"entry {one.name} was begun and not finished: it does not count; run its command "
                "again"
            )
    expected = ledger.replay(entries)
    for one in entries:
        run = runs[one.digest]
        report.items += len(one.tags) + len(run.files)
        where = f"ledger entry {one.name} ({run.snapshot.run_id})"
        wanted = _expected_run(one, run, expected)
        if one.digest in closing:
            wanted.status, wanted.ended = run.snapshot.status, run.snapshot.ended
        report.add(where, differences(wanted, run.snapshot))
    report.entries = len(entries)
    return in_order(entries), pending


def _expected_run(one: Entry, run: LedgerRun, expected: Settings) -> Snapshot:
    """What the run of an entry ought to hold. Envelope and key are checked as signatures."""
    found = run.snapshot
    files = {ENTRY: one.digest}
    if one.signer is not None:
        unknown = "0" * 64
        files |= {name: found.artifacts.get(name, unknown) for name in (ENVELOPE, PUBLIC_KEY)}
    return Snapshot(
        found.run_id,
        found.experiment_id,
        one.name,
        FINISHED,
        one.at,
        one.at,
        tags=_with(one.tags, expected.runs.get(found.run_id, {})),
        artifacts=files,
    )


def _with(tags: Mapping[str, str], later: Mapping[str, str | None]) -> dict[str, str]:
    merged = {**tags, **later}
    return {name: value for name, value in merged.items() if value is not None}


def _check_chain(
    report: Report,
    entries: Sequence[Entry],
    head: Sequence[str] | None,
    witness: Mapping[str, int] | None,
    known_heads: Sequence[tuple[int, tuple[str, ...]]],
) -> None:
    report.add("ledger", ledger.chain_faults(entries, head))
    digests = {one.digest for one in entries}
    if entries:
        place = ledger.after(entries)
        report.head = ledger.head_text(place.number - 1, place.previous)
    for digest, number in (witness or {}).items():
        if digest not in digests:
            what = (
                f"entry {number} (digest {digest[:16]}…), which was appended from here, is not in "
                "the database: it was removed, or the database replaced by another or an older one"
            )
            report.add("ledger", [what])
    for number, ends in known_heads:
        for digest in ends:
            if digest not in digests:
                report.add("ledger", [f"the head {number}:{digest[:16]}… is not in this ledger"])


def _check_signatures(
    source: Source, report: Report, entries: Sequence[Entry], trusted: Sequence[Key]
) -> None:
    files = {
        digest_bytes(run.files[ENTRY]): run.files for run in source.ledger() if ENTRY in run.files
    }
    good = set()
    for one in entries:
        if one.signer is None:
            report.signed.setdefault("", []).append(one.number)
            continue
        own = files[one.digest]
        try:
            keyid = signing.signed_by(
                own[ENVELOPE], {ENTRY: one.digest}, trusted, own.get(PUBLIC_KEY)
            )
            if keyid != one.signer or not signing.is_key(own[PUBLIC_KEY], keyid):
                raise ValueError("the key is not the one that the entry names")
        except KeyError as error:
            report.add(f"ledger entry {one.name}", [f"its signature is gone ({error})"])
        except ValueError as error:
            report.add(f"ledger entry {one.name}", [f"its signature does not hold: {error}"])
        else:
            report.signed.setdefault(keyid, []).append(one.number)
            good.add(one.digest)
    if trusted:
        _check_covered(report, entries, good)


def _check_covered(report: Report, entries: Sequence[Entry], good: set[str]) -> None:
    """An entry vouches for all those before it: their digests are in it."""
    by_digest = {one.digest: one for one in entries}
    covered, waiting = set(), list(good)
    while waiting:
        digest = waiting.pop()
        if digest in by_digest and digest not in covered:
            covered.add(digest)
            waiting += by_digest[digest].previous
    bare = [one.number for one in entries if one.digest not in covered]
    if bare:
        report.add("ledger", [f"no trusted signature covers entry {', '.join(map(str, bare))}"])


def _check_recorded(
    source: Source,
    report: Report,
    one: Entry,
    expected: Settings,
    pending: Sequence[Entry],
    retired: Mapping[str, str],
) -> None:
    """The run of a decision or analysis, and its children; but for those that were retired."""
    what = one.body["what"]
    run_id, about = what["run_id"], f"{one.body['about']} (entry {one.number})"
    recorded = _check_run(
        source, report, run_id, what["evidence"], f"run {run_id} of {about}", expected, pending
    )
    if recorded is None:
        return
    children = recorded[1]
    gone = [child for child, digest in children.items() if retired.get(child) == digest]
    if gone:
        report.notes.append(f"{len(gone)} run(s) of {about} were retired; the decision stays")
    for child, digest in children.items():
        if child in gone:
            continue
        _check_run(source, report, child, digest, f"run {child} of {about}", expected, pending)
    added = [c for c in source.children(run_id) or () if c not in children]
    report.add(f"run {run_id} of {about}", [f"run {c} was added below it" for c in added])
    if one.kind == DECISION:
        _check_decision(source, report, one, about)


def _check_run(
    source: Source,
    report: Report,
    run_id: str,
    evidence: str,
    where: str,
    expected: Settings,
    pending: Sequence[Entry],
) -> tuple[Snapshot, dict[str, str]] | None:
    """One run against its evidence, and the evidence against the digest that is kept elsewhere."""
    report.runs += 1
    data = source.artifact(run_id, EVIDENCE)
    recorded: Snapshot | None = None
    children: dict[str, str] = {}
    if data is not None and digest_bytes(data) == evidence:
        recorded, children = read_evidence(data)
    found = source.snapshot(run_id, recorded.metrics if recorded else ())
    if found is None:
        report.add(where, ["the run is gone, or was deleted"])
        return None
    if recorded is None:
        report.add(where, [f"artifact {EVIDENCE} is gone or was changed"])
        return None
    where = f"{where}, {recorded.name!r}"
    report.items += sum(
        len(group)
        for group in (recorded.tags, recorded.params, recorded.metrics, recorded.inputs,
                      recorded.artifacts)
    )  # fmt: skip
    tags = _with(recorded.tags, expected.runs.get(run_id, {}))
    for late in pending:  # under way when it was killed: either is right
        for name, value in late.settings.runs.get(run_id, {}).items():
            if found.tags.get(name) == value and value is not None:
                tags[name] = value
    report.add(where, differences(replace(recorded, tags=tags), found))
    return recorded, children


def _check_decision(source: Source, report: Report, one: Entry, about: str) -> None:
    """The decision's own digest, which its cells' outcomes are part of."""
    what = one.body["what"]
    data = source.artifact(what["run_id"], "decision.json")
    try:
        body = json.loads(data or b"")
        stated = body.pop("digest")
        body.pop("issued")
        ok = stated == digest_json(body) == what["decision_digest"]
    except (ValueError, KeyError, AttributeError):
        ok = False
    if not ok:
        report.add(
            f"run {what['run_id']} of {about}", ["decision.json is not the decision entered"]
        )


def _check_settings(source: Source, report: Report, expected: Settings, late: Settings) -> None:
    """Tags of experiments, and aliases, as the ledger set them last.

    ``late``: what was under way when something died: either is right.
    """
    for experiment_id, wanted in expected.experiments.items():
        found = source.experiment_tags(experiment_id)
        where = f"experiment {experiment_id}"
        if found is None:
            if source.complete:
                report.add(where, ["it is gone, or was deleted"])
            continue
        known = {**wanted, **dict.fromkeys(OWN_EXPERIMENT_TAGS)}
        for name, value in wanted.items():
            now = found.get(name)
            report.items += 1
            if now not in (value, late.experiments.get(experiment_id, {}).get(name, value)):
                what = "its note" if name == NOTE else f"tag {name}"
                report.add(where, [f"{what} is not what was recorded last"])
        added = [n for n in found if n.startswith(PREFIX) and n not in known]
        report.add(where, [f"tag {name} was added" for name in added])
    for name, wanted in expected.aliases.items():
        now = source.aliases(name)
        if now is None:
            continue
        for alias in ALIASES:
            report.items += 1
            value = wanted.get(alias)
            if now.get(alias) not in (value, late.aliases.get(name, {}).get(alias, value)):
                what = (
                    f"alias {alias} points to version {now.get(alias) or 'none'}; by the ledger to "
                    f"{value or 'none'}"
                )
                report.add(f"model {name}", [what])


def _check_version(
    source: Source, report: Report, key: str, wanted: Mapping[str, Any], late: Settings
) -> None:
    name, _, number = key.rpartition("/")
    where = f"model {name} version {number}"
    if "files" not in wanted:
        report.add(where, ["the entry that registered it is missing"])
        return
    found = source.version(name, number)
    if found is None:
        if source.complete:
            report.add(where, ["it is gone"])
        return
    under_way = late.versions.get(key, {}).get("tags", {})
    tags = wanted["tags"] | {t: v for t, v in under_way.items() if found.tags.get(t) == v}
    report.items += len(tags) + len(wanted["files"])
    was = Snapshot("", "", "", "", 0, None, tags=tags, artifacts=dict(wanted["files"]))
    own = {n: v for n, v in found.tags.items() if n.startswith(PREFIX)}
    now = Snapshot("", "", "", "", 0, None, tags=own, artifacts=dict(found.files))
    report.add(where, differences(was, now))
    for what in ("run_id", "source", "description"):
        if getattr(found, what) != wanted.get(what):
            report.add(where, [f"its {what} is not what was recorded"])


def _check_unentered(source: Source, report: Report, entries: Sequence[Entry]) -> None:
    """Finished sweeps that no entry vouches for."""
    entered = {one.body["what"].get("run_id") for one in entries}
    for sweep in source.sweeps() or ():
        if sweep.run_id in entered:
            continue
        where = f"run {sweep.run_id}, {sweep.name!r}"
        if sweep.deleted:
            report.notes.append(f"{where}: deleted before it was entered in the ledger")
        elif sweep.status == FINISHED and not sweep.interrupted:
            what = "it is finished, and no entry of the ledger vouches for it"
            report.add(where, [what])
        else:
            report.notes.append(
                f"{where}: not finished ({sweep.status.lower()}); run its config again"
            )


def _note_expired(report: Report, entries: Sequence[Entry], expected: Settings) -> None:
    today = datetime.now(UTC).date().isoformat()
    for name, aliases in expected.aliases.items():
        version = aliases.get(CHAMPION)
        tags = expected.versions.get(f"{name}/{version}", {}).get("tags", {})
        expires = tags.get(PREFIX + "expires")
        if version and expires and expires < today:
            report.notes.append(
                f"champion of {name} (version {version}) expired on {expires}: sweep and review "
                "again"
            )
