"""The evidence pack: a folder that verifies without the store it came from.

``run.json`` files hold what MLflow held when the pack was written; beside them lie all artifacts,
and the ledger as far as it went. ``SHA256SUMS`` names every file (``sha256sum -c`` checks it), and
where a key was given an envelope signs that.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key

from audit import encode, signing
from audit.evaluations import Recorded
from audit.evidence import EVIDENCE, Snapshot, canonical, read_evidence
from audit.ledger import DECISION, ENVELOPE, PUBLIC_KEY, REPRODUCTION
from audit.mapping import Facts, mapping, mapping_markdown
from audit.model_card import model_card
from audit.review import Case, open_case
from audit.signing import PACK_TYPE, Signer
from audit.store import Store
from audit.verify import (
    Finding,
    LedgerRun,
    Report,
    finished_entries,
    ledger_files,
    require_intact,
    verify,
)
from halfstep.digest import digest_bytes, digest_folder
from halfstep.errors import Tampered, UserError

SUMS, HEAD, RUN = "SHA256SUMS", "head.json", "run.json"
UNSIGNED = (SUMS, ENVELOPE, PUBLIC_KEY)
"""What the sums do not name: themselves, and what signs them."""
SHOWN = ("report.html", "decision.md", "decision.json", "decision.schema.json")


def export(store: Store, sweep: str, folder: Path, signer: Signer | None) -> dict[str, Any]:
    """Writes the pack of a sweep to a new folder, whole or not at all; returns what it holds.

    Raises:
        Tampered: the store is not as it was recorded.
        UserError: the folder is there already, or there is no such sweep.
    """
    if folder.exists():
        raise UserError(f"export: {folder} exists already; name a new folder")
    case = open_case(store, sweep)
    run_id = str(case.what["run_id"])
    require_intact(case.source, run_id, "export")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _write(staging, _files(store, case, run_id))
        sums = _sums(staging)
        (staging / SUMS).write_bytes(sums)
        if signer is not None:
            about = {"sweep_id": case.what["sweep_id"], "decision": case.what["decision_digest"]}
            envelope = signing.envelope(signer, {SUMS: digest_bytes(sums)}, PACK_TYPE, about)
            (staging / ENVELOPE).write_bytes(envelope)
            (staging / PUBLIC_KEY).write_bytes(signer.public_pem)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {
        "folder": str(folder),
        "sweep_id": case.what["sweep_id"],
        "files": len(sums.splitlines()),
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "signed_by": signer.keyid if signer else None,
        "gaps": sum(p["state"] == "gap" for p in mapping(_facts(case))),
    }


def _files(store: Store, case: Case, run_id: str) -> Iterable[tuple[str, bytes]]:
    recorded, source = Recorded(store, run_id), case.source
    _, children = read_evidence(recorded.artifact(EVIDENCE))
    for one in (run_id, *children):
        snapshot = source.snapshot(one, ())
        assert snapshot is not None  # verified just before
        yield f"runs/{one}/{RUN}", canonical(snapshot.to_json())
        for name in (*snapshot.artifacts, EVIDENCE):
            data = source.artifact(one, name)
            assert data is not None
            yield f"runs/{one}/artifacts/{name}", data
    for run in source.ledger():
        if run.snapshot.status == "FINISHED" and not run.deleted:
            place = f"ledger/{run.snapshot.run_id}"
            yield f"{place}/{RUN}", canonical(run.snapshot.to_json())
            for name, data in run.files.items():
                yield f"{place}/{name}", data
    yield HEAD, canonical({"digests": list(source.head() or ()), "run_id": run_id})
    for name in SHOWN:
        yield name, recorded.artifact(name)
    facts, result = _facts(case), recorded.result
    decided = json.loads(recorded.artifact("decision.json"))
    yield "model-card.md", model_card(result, decided, recorded.subject, case.signed_off).encode()
    points = mapping(facts)
    yield "mapping.json", encode.json_bytes(points)
    yield "mapping.md", mapping_markdown(points).encode()
    readme = resources.files("audit").joinpath("templates/pack.md").read_text(encoding="utf-8")
    yield "README.md", readme.format(
        name=result["name"], summary=decided["summary"], sweep_id=result["sweep_id"],
        run_id=run_id, decision=decided["digest"], envelope=ENVELOPE,
    ).encode()  # fmt: skip


def _facts(case: Case) -> Facts:
    return Facts(
        case.result,
        [one.body["what"] for one in case.reviews],
        case.decided.signer is not None,
        [
            one.body["what"]
            for one in case.entries
            if one.kind == REPRODUCTION and one.body["what"]["sweep_id"] == case.what["sweep_id"]
        ],
    )


def _write(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    for name, data in files:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def _digests(folder: Path) -> dict[str, str]:
    """What the sums name."""
    return {name: sha for name, sha in digest_folder(folder).items() if name not in UNSIGNED}


def _sums(folder: Path) -> bytes:
    """As ``sha256sum`` writes them."""
    lines = [f"{sha}  {name}\n" for name, sha in sorted(_digests(folder).items())]
    return "".join(lines).encode()


class Pack:
    """A pack as a `audit.verify.Source`."""

    complete = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            head = json.loads((folder / HEAD).read_bytes())
            self._head, self.run_id = head["digests"], str(head["run_id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is not an evidence pack ({HEAD} is missing or odd)"
            ) from error

    def ledger(self) -> list[LedgerRun]:
        found = []
        for place in sorted((self._folder / "ledger").glob("*")):
            files = ledger_files(place)
            artifacts = {name: digest_bytes(data) for name, data in files.items()}
            snapshot = self._read(place / RUN, artifacts)
            if snapshot is not None:
                found.append(LedgerRun(snapshot, False, files))
        return found

    def head(self) -> Sequence[str]:
        return list(self._head)

    def snapshot(self, run_id: str, metrics: Iterable[str]) -> Snapshot | None:
        folder = self._folder / "runs" / run_id
        artifacts = digest_folder(folder / "artifacts")
        artifacts.pop(EVIDENCE, None)
        return self._read(folder / RUN, artifacts)

    def artifact(self, run_id: str, path: str) -> bytes | None:
        place = self._folder / "runs" / run_id / "artifacts" / path
        return place.read_bytes() if place.is_file() else None

    def children(self, run_id: str) -> list[str]:
        return [p.name for p in (self._folder / "runs").glob("*") if p.name != run_id]

    def witness(self) -> None:
        return None

    def sweeps(self) -> None:
        return None

    def experiment_tags(self, experiment_id: str) -> None:
        return None

    def version(self, name: str, version: str) -> None:
        return None

    def aliases(self, name: str) -> None:
        return None

    def orphans(self) -> list[str]:
        return []

    def _read(self, path: Path, artifacts: Mapping[str, str]) -> Snapshot | None:
        """The snapshot in a file, with the artifacts that lie here."""
        try:
            found = Snapshot.from_json(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        found.artifacts = dict(artifacts)
        found.shown = {name: points[-1] for name, points in found.metrics.items() if points}
        return found


def verify_pack(
    folder: Path,
    trusted: Sequence[Key] = (),
    known_heads: Sequence[tuple[int, tuple[str, ...]]] = (),
) -> Report:
    """Checks a pack's files, its own signature, its ledger and every run in it.

    Raises:
        UserError: the folder is no pack.
    """
    pack = Pack(folder)
    report = verify(pack, pack.run_id, trusted, known_heads)
    with suppress(Tampered):  # `verify` has named what cannot be read
        decided = [one for one in finished_entries(pack) if one.kind == DECISION]
        if not any(one.body["what"]["run_id"] == pack.run_id for one in decided):
            report.add("ledger", [f"no entry vouches for run {pack.run_id}, which this pack is of"])
    sums = folder / SUMS
    stated = sums.read_bytes() if sums.is_file() else b""
    lines = stated.decode(errors="replace").splitlines()
    was = {name: sha for sha, _, name in (line.partition("  ") for line in lines)}
    now = _digests(folder)
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            what = "gone" if name not in now else "added" if name not in was else "changed"
            report.findings.append(Finding(f"file {name}", f"it was {what} (by {SUMS})"))
    _check_own_signature(folder, stated, report, trusted)
    return report


def _check_own_signature(folder: Path, sums: bytes, report: Report, trusted: Sequence[Key]) -> None:
    envelope, own = folder / ENVELOPE, folder / PUBLIC_KEY
    if not envelope.is_file():
        text = "the pack itself is not signed"
        if trusted:
            report.add("pack", [text])
        else:
            report.notes.append(text)
        return
    try:
        keyid = signing.signed_by(
            envelope.read_bytes(),
            {SUMS: digest_bytes(sums)},
            trusted,
            own.read_bytes() if own.is_file() else None,
        )
        report.notes.append(f"the pack is signed by key {keyid[:16]}")
    except ValueError as error:
        report.add("pack", [f"its signature does not hold: {error}"])
