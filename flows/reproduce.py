"""`halfstep reproduce`: runs a sweep or a cell again from what the trail holds, and compares.

Everything is made anew in a scratch store: the subject is loaded or trained again, the data read
again. Nothing but the recorded config is taken from the trail, and the registry's models where the
config names one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from audit import environment, lookup
from audit.evaluations import Evaluation, Recorded, protocol_differences
from audit.evidence import PREFIX
from audit.protocol import implementation
from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan
from flows.progress import reporter
from halfstep.errors import UserError
from tasks.calibrate import run_calibration
from tasks.cell import run_cell
from tasks.evaluated import Evaluated
from tasks.load import load
from tasks.plan import Plan
from tasks.reference import measure_reference

IDENTICAL, SAME_OUTCOMES = "identical", "same outcomes"
STANDS, CHANGED, DIFFERS = "stands", "changed", "differs"
REPRODUCED = (IDENTICAL, SAME_OUTCOMES)
SAYS = {
    IDENTICAL: "IDENTICAL: every digest is the recorded one, bit for bit",
    SAME_OUTCOMES: "SAME OUTCOMES, bit for bit, and the same verdicts, by other code: so the "
    "digests of protocol and decision are others",
    STANDS: "DIFFERS: outcomes are not the recorded bits, but the decision stands",
    CHANGED: "DIFFERS: the decision does not stand",
    DIFFERS: "DIFFERS: this run's outcomes are not the recorded ones; reproduce its sweep to see "
    "whether the decision stands",
}
VOLATILE = ("provenance.started", "provenance.arguments", "host.load_average")
"""Facts that differ between any two runs."""
CODE_BOUND = ("protocol", "decision")
"""Checks of digests that hold a digest of the code: they change with it, whatever it computes."""


def reproduce(store: Store, wanted: str, keep: Path | None = None) -> dict[str, Any]:
    """Runs it again; returns what is equal and what is not.

    Args:
        wanted: a sweep, or a cell, confirmation or reference by its run.
        keep: a new folder for the scratch store; a temporary one by default.

    Raises:
        UserError: there is no such run, or what it needs is gone.
    """
    found = lookup.find(store, wanted)
    recorded = Recorded(store, wanted)
    with ExitStack() as held:
        folder = keep or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="halfstep-")))
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--keep {folder}: the folder is not empty")
        scratch = Store(folder / "mlruns", apart=True)
        scratch.check_writable()
        config = folder / "config.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_bytes(recorded.artifact("config/config.yaml"))
        plan = read_plan(config)
        if "cells" in found:
            text = config.read_text(encoding="utf-8")
            stage = recorded.result["stages"].get("deployment")
            # A clock gives no number twice: decisions are reproduced from the times of then.
            times = stage["timing"] if stage else None
            now = conduct(plan, text, scratch, registry=store, times=times)
            checks = _sweep_checks(recorded.result, now)
            stands = _decided(now) == _decided(recorded.result)
            status = _status(checks, STANDS if stands else CHANGED)
        else:
            evaluation = recorded.evaluation(found["run_id"])
            checks = _one_again(plan, evaluation, scratch, store)
            status = _status(checks, DIFFERS)
    return {
        "run_id": found["run_id"],
        "sweep_id": recorded.result["sweep_id"],
        "status": status,
        "says": SAYS[status],
        "checks": checks,
        "implementation": protocol_differences(
            recorded.subject["implementation"], implementation(plan.plugins)
        ),
        "environment": _environment_differences(recorded.environment, environment.capture()),
    }


def _status(checks: Sequence[Mapping[str, Any]], otherwise: str) -> str:
    different = {check["what"] for check in checks if not check["equal"]}
    if not different:
        return IDENTICAL
    return SAME_OUTCOMES if different <= set(CODE_BOUND) else otherwise


def _sweep_checks(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    checks = [
        _check("subject", recorded["subject_digest"], now["subject_digest"]),
        _check("protocol", recorded["protocol_digest"], now["protocol_digest"]),
    ]
    for was, is_ in zip(recorded["tasks"], now["tasks"], strict=True):
        for split in was["splits"]:
            data = [side["splits"][split]["sha256"] for side in (was, is_)]
            checks += [_check(f"data of {was['name']} · {split}", *data)]
        for split in was["reference"]:
            pair = [side["reference"][split] for side in (was, is_)]
            checks += _outcome_checks(f"reference · {was['name']} · {split}", *pair)
    for kind in ("cells", "confirmation"):
        again = {(c["name"], c["task"]): c for c in now[kind]}
        for cell in recorded[kind]:
            name = f"{cell['name']} · {cell['task']}" + (
                " · confirmation" if kind != "cells" else ""
            )
            other = again.get((cell["name"], cell["task"]))
            if other is None:
                checks.append(_check(name, cell["verdict"], None))
                continue
            checks += _outcome_checks(name, cell, other)
            checks.append(_check(f"{name}: verdict", cell["verdict"], other["verdict"]))
    return [*checks, _check("decision", recorded["decision"]["digest"], now["decision"]["digest"])]


def _outcome_checks(
    name: str, recorded: Mapping[str, Any], now: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The outcomes' digest; where it differs, every metric that does."""
    outcomes = _check(f"{name}: outcomes", recorded["outcomes_digest"], now["outcomes_digest"])
    if outcomes["equal"]:
        return [outcomes]
    return [
        outcomes,
        *(
            _check(f"{name}: {metric}", value, now["metrics"].get(metric))
            for metric, value in recorded["metrics"].items()
            if value != now["metrics"].get(metric)
        ),
    ]


def _check(what: str, recorded: object, now: object) -> dict[str, Any]:
    return {"what": what, "recorded": recorded, "now": now, "equal": recorded == now}


def _decided(result: Mapping[str, Any]) -> tuple[str, str | None]:
    return result["decision"]["verdict"], result["decision"]["cell"]


def _one_again(
    plan: Plan, evaluation: Evaluation, scratch: Store, registry: Store
) -> list[dict[str, Any]]:
    """One evaluation, with the reference and the calibration that it needs."""
    tags, sweep = evaluation.run.data.tags, evaluation.sweep.result
    kind, name = tags[PREFIX + "kind"], evaluation.name
    if kind == "reference":
        task = next(t for t in sweep["tasks"] if t["name"] == evaluation.task)
        recorded = task["reference"][evaluation.split]
        schemes = plan.schemes[:1]
    else:
        cells = sweep["cells" if kind == "cell" else "confirmation"]
        recorded = next(c for c in cells if c["run_id"] == evaluation.run.info.run_id)
        schemes = tuple(s for s in plan.schemes if s.name == recorded["name"])
        if not schemes or recorded["stopped"]:
            why = "stopped early" if recorded["stopped"] else "was found by the sweep's search"
            raise UserError(
                f"{name} {why}, which depends on the whole sweep; reproduce that: halfstep "
                f"reproduce {sweep['sweep_id']}"
            )
    alone = replace(plan, schemes=schemes, mixed=None, sensitivity=None)
    reporter().say("loading data and subject")
    loaded = load(alone, scratch, registry)
    folder = scratch.sweep(loaded.sweep_key, False)

    def reference(split: str, task: str) -> Evaluated:
        reporter().say(f"reference · {task} · {split}")
        return measure_reference(loaded, task, split, folder, reporter().advance)

    again = reference(evaluation.split, evaluation.task)
    if kind != "reference":
        selection = {t.name: reference("selection", t.name) for t in alone.tasks}
        calibrated = run_calibration(loaded, selection, folder, reporter().advance)
        reporter().say(name)
        again = run_cell(
            loaded, calibrated.treatments, schemes[0], evaluation.task, evaluation.split,
            again, folder, reporter().advance,
        )  # fmt: skip
    protocol = loaded.task_protocols[evaluation.task]
    task = next(t for t in sweep["tasks"] if t["name"] == evaluation.task)
    metrics = again.record.detail.get("metrics", again.record.metrics)
    now = {"outcomes_digest": again.record.detail["outcomes_digest"], "metrics": metrics}
    return [
        _check("subject", sweep["subject_digest"], loaded.subject.digest),
        _check("protocol", task["protocol_digest"], protocol),
        *_outcome_checks(name, recorded, now),
    ]


def _environment_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> Sequence[str]:
    """Facts that are not the same, with both values."""
    return [
        text.replace(".value: ", ": ", 1)
        for text in protocol_differences(recorded, now)
        if not text.startswith(VOLATILE) and ".num_threads" not in text
    ]
