"""Retention: what may go, and what a decision that holds still needs.

The ledger, and the run of every sweep with its decision, report and result, stay for ever. What may
go are the runs of cells, references and calibrations below it, with their artifacts, and the spool.
Going is an entry of the ledger, which names each run and the digest of its evidence: `verify` then
knows that it was retired, and not removed behind everybody's back.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from audit import ledger
from audit.evidence import EVIDENCE, read_evidence
from audit.issuer import Issuer
from audit.ledger import DECISION, RETIREMENT, REVIEW, Entry, Settings
from audit.ledger_runs import LedgerWriter
from audit.reading import TrackingStore
from audit.store import Store, SweepFolder
from audit.trail import connect
from audit.verify import finished_entries, retired_runs


@dataclass(frozen=True)
class Held:
    """A sweep, and why its evidence stays; no reason where it may go."""

    sweep_id: str
    run_id: str
    experiment: str
    decided: str
    reasons: tuple[str, ...]
    runs: dict[str, str]
    """The runs below it that are still there, by id the digest of their evidence."""

    def to_json(self) -> dict[str, Any]:
        return {
            "sweep_id": self.sweep_id,
            "run_id": self.run_id,
            "experiment": self.experiment,
            "decided": self.decided,
            "kept_because": list(self.reasons),
            "runs": len(self.runs),
        }


def standing(store: Store, days: int, today: date) -> list[Held]:
    """Every decided sweep whose runs are there, oldest first."""
    source = TrackingStore(store)
    entries = finished_entries(source)
    gone = retired_runs(entries)
    needed = _needed(entries, today)
    found = []
    for one in entries:
        what = one.body["what"]
        if one.kind != DECISION:
            continue
        data = source.artifact(what["run_id"], EVIDENCE)
        children = read_evidence(data)[1] if data is not None else {}
        left = {run: digest for run, digest in children.items() if run not in gone}
        if not left:
            continue
        day = datetime.fromtimestamp(one.at / 1000, UTC).date()
        reasons = list(needed.get(what["run_id"], ()))
        if day > today - timedelta(days=days):
            reasons.append(f"younger than {days} days")
        found.append(
            Held(what["sweep_id"], what["run_id"], what["experiment"], day.isoformat(),
                 tuple(reasons), left)
        )  # fmt: skip
    return found


def _needed(entries: list[Entry], today: date) -> dict[str, list[str]]:
    """Why the evidence of a sweep is needed, by its run."""
    expected = ledger.replay(entries)
    reasons: dict[str, list[str]] = {}
    newest: dict[str, str] = {}
    for one in entries:
        what = one.body["what"]
        if one.kind == DECISION:
            newest[what["experiment"]] = what["run_id"]
        elif one.kind == REVIEW and what.get("until") and what["until"] >= today.isoformat():
            reasons.setdefault(what["run_id"], []).append(f"signed off until {what['until']}")
    for experiment, run_id in newest.items():
        reasons.setdefault(run_id, []).append(f"the newest decision of {experiment}")
    for name, aliases in expected.aliases.items():
        for alias, version in aliases.items():
            held = expected.versions.get(f"{name}/{version}", {}) if version else {}
            if held:
                reasons.setdefault(held["run_id"], []).append(f"{alias} of model {name}")
    return reasons


def retire(store: Store, held: Held, why: str, issuer: Issuer) -> Entry:
    """Enters that the runs below a sweep are retired, then deletes them. The caller holds the
    store. Killed in between, the same call goes on."""
    client = connect(store)
    writer = LedgerWriter(store, client, issuer.signer)
    what = {"sweep_id": held.sweep_id, "run_id": held.run_id, "runs": held.runs, "why": why,
            "author": issuer.name}  # fmt: skip
    shows = {
        "tags": {"sweep_id": held.sweep_id, "by": issuer.name},
        "note": f"{len(held.runs)} run(s) of sweep {held.sweep_id} were retired: {why}. Its "
        "decision, report and result stay.",
    }
    about = f"{held.experiment} · {len(held.runs)} runs"
    entry = writer.append(RETIREMENT, f"{held.run_id}:{why}", about, what, Settings(), shows)
    delete_retired(store, list(held.runs))
    return entry


def delete_retired(store: Store, runs: list[str]) -> None:
    """Deletes runs and their artifacts; those that are gone already are left alone. ``mlflow gc``
    frees their rows."""
    client = connect(store)
    for run_id in runs:
        try:
            run = client.get_run(run_id)
        except MlflowException:
            continue
        get_artifact_repository(run.info.artifact_uri, store.tracking_uri).delete_artifacts()
        if run.info.lifecycle_stage == "active":
            client.delete_run(run_id)


def finish_retiring(store: Store) -> None:
    """Deletes what an interrupted call entered and did not delete."""
    retired = retired_runs(finished_entries(TrackingStore(store)))
    client = connect(store)
    open_still = []
    for run_id in retired:
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                open_still.append(run_id)
        except MlflowException:
            continue
    delete_retired(store, open_still)


def spool_to_clear(store: Store, days: int, now: float) -> dict[str, int]:
    """Bytes of the finished sweeps in the spool that ended so long ago, by their id. Their results
    stay, so that the same command still finds them."""
    found = {}
    for folder in sorted(store.spool.glob("*-*")):
        result = SweepFolder(folder).result
        if result.exists() and result.stat().st_mtime <= now - days * 86400:
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f != result)
            if size:
                found[folder.name] = size
    return found


def clear_spool(store: Store, sweeps: list[str]) -> None:
    """Removes the records of sweeps that are in the trail. The caller holds the store."""
    for name in sweeps:
        for one in (store.spool / name).iterdir():
            if one.is_dir():
                shutil.rmtree(one)
