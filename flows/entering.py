"""Entering what was recorded into the ledger, and a chosen variant into the model registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.issuer import Issuer
from audit.ledger import (
    ANALYSIS,
    CANDIDATE,
    DECISION,
    REPRODUCTION,
    SUCCESSION,
    Entry,
    Settings,
)
from audit.note import sweep_note, taken_text, variant_note
from audit.spool import Record
from audit.store import Store
from halfstep.digest import digest_json

if TYPE_CHECKING:
    from audit.trail import Trail

NOT_REVIEWED = "nobody yet"


def enter_decision(
    trail: Trail,
    run_id: str,
    evidence: str,
    result: Mapping[str, Any],
    variant: tuple[Record, Path] | None,
) -> None:
    """Registers the variant that went to confirmation and enters the decision. Only a confirmed one
    becomes the candidate."""
    decision, issued = result["decision"], result["issued"]
    sets, model = Settings(), None
    if variant is not None:
        record, folder = variant
        tags = {
            "sweep_id": result["sweep_id"],
            "cell": record.name,
            "verdict": decision["verdict"],
            "decision_digest": decision["digest"],
            "expires": issued["expires"],
            "signed_off": NOT_REVIEWED,
        }
        version, sets = trail.register(
            result["name"], run_id, record, folder, tags, variant_note(result, record)
        )
        model = {"name": version.name, "version": version.version, "model_id": version.model_id}
        if decision["verdict"] == "accept":
            sets = sets.then(Settings(aliases={version.name: {CANDIDATE: version.version}}))
    what = {
        "sweep_id": result["sweep_id"],
        "run_id": run_id,
        "evidence": evidence,
        "experiment": result["experiment"],
        "subject_digest": result["subject_digest"],
        "protocol_digest": result["protocol_digest"],
        "decision_digest": decision["digest"],
        "verdict": decision["verdict"],
        "cell": decision["cell"],
        "candidate": variant[0].name if variant else None,
        "expires": issued["expires"],
        "author": issued["author"],
        "model": model,
    }
    shows = {
        "tags": {
            "sweep_id": result["sweep_id"],
            "verdict": decision["verdict"],
            "cell": decision["cell"] or "none",
            "decision_digest": decision["digest"],
            "author": issued["author"],
        },
        "note": f"**{decision['summary']}.** Decided by sweep {result['sweep_id']} of "
        f"{result['experiment']}, run `{run_id}`, declared author {issued['author']}.",
    }
    about = f"{result['experiment']} · {decision['verdict']}"
    trail.enter(DECISION, about, what, shows, sweep_note(result), sets)


def enter_reproduction(store: Store, found: Mapping[str, Any], issuer: Issuer) -> Entry:
    """Enters what a reproduction came to. The caller holds the store."""
    from audit.ledger_runs import LedgerWriter
    from audit.trail import connect

    writer = LedgerWriter(store, connect(store), issuer.signer)
    differing = [check for check in found["checks"] if not check["equal"]]
    what = {
        "run_id": found["run_id"],
        "sweep_id": found["sweep_id"],
        "status": found["status"],
        "checks": len(found["checks"]),
        "differing": differing,
        "implementation": found["implementation"],
        "environment": list(found["environment"]),
        "author": issuer.name,
    }
    shows = {
        "tags": {"sweep_id": found["sweep_id"], "outcome": found["status"], "by": issuer.name},
        "note": f"{found['says']}. Sweep {found['sweep_id']}, run `{found['run_id']}`; "
        f"{len(differing)} of {len(found['checks'])} checks differ.",
    }
    key = f"{found['run_id']}:{digest_json(what)}"
    return writer.append(
        REPRODUCTION, key, f"{found['sweep_id']} · {found['status']}", what, Settings(), shows
    )


def enter_succession(store: Store, found: Mapping[str, Any], issuer: Issuer) -> Entry:
    """Enters whether a scheme still stands for a new version of a model, and marks the sweep. The
    caller holds the store."""
    from audit.evidence import PREFIX
    from audit.ledger_runs import LedgerWriter
    from audit.trail import connect

    writer = LedgerWriter(store, connect(store), issuer.signer)
    model, version = found["model"], found["version"]
    told = f"{model} version {version}: {found['outcome']}"
    shows = {
        "tags": {"sweep_id": found["sweep_id"], "outcome": found["outcome"], "by": issuer.name},
        "note": f"**{told}.** {found['why']}. Sweep {found['sweep_id']}, run `{found['run_id']}`; "
        f"the version before: {found['previous_version'] or 'none'}. Reused: "
        f"{taken_text(found['reused'])}.",
    }
    mark = {PREFIX + "model_version": f"{model}/{version}", PREFIX + "succession": found["outcome"]}
    sets = Settings(runs={found["run_id"]: dict(mark)})
    key = f"{model}:{version}:{found['run_id']}"
    what = {**found, "author": issuer.name}
    return writer.append(SUCCESSION, key, told, what, sets, shows)


def enter_analysis(
    trail: Trail, name: str, run_id: str, evidence: str, found: Mapping[str, Any], issuer: Issuer
) -> None:
    """Enters a sensitivity analysis that stands by itself."""
    what = {"run_id": run_id, "evidence": evidence, "experiment": name, "author": issuer.name}
    shows = {
        "tags": {"author": issuer.name},
        "note": f"Sensitivity of {found['scheme']} in {name}, run `{run_id}`.",
    }
    trail.enter(ANALYSIS, f"{name} · sensitivity", what, shows)
