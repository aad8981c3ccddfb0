"""The decision record: what was chosen, what else could have been, and on what it rests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from backends.hardware import target
from evaluators.acceptance import ACCEPT, Finding
from evaluators.stopping import EARLY_SHARE
from halfstep.digest import digest_json
from halfstep.interval import Interval
from halfstep.scheme import Scheme
from tasks.decide import Decision, Evaluations, bounds, objective, price
from tasks.load import Loaded

SCHEMA = "halfstep-decision/4"

SIMULATED_LIMIT = (
    "Simulated numerics: values are rounded as the format rounds them; a deployed kernel may order "
    "its sums differently."
)
DEPLOYED_LIMIT = (
    "Times, memory and costs are those of the machine named under deployment, in its state then."
)
LIMITS = (
    "A verdict holds for data like the selection and confirmation splits, and for nothing else.",
    "Residual adds, norms, activation functions and biases stay at full precision.",
)

Cells = Sequence[tuple[Scheme, Evaluations]]


def decision_json(
    loaded: Loaded,
    decision: Decision,
    cells: Cells,
    confirmed: Evaluations,
    references: Evaluations,
) -> dict[str, Any]:
    """The record's body: free of times and run ids, so that equal evidence gives equal bytes."""
    plan = loaded.plan
    target = _target(loaded, decision.chosen)
    summary = decision.summary
    if target is not None and target["why_simulated"] and decision.cell is not None:
        summary += f"; in simulation only, because {target['why_simulated']}"
    deployed = decision.chosen is not None and decision.chosen.deployed
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": decision.verdict,
        "cell": decision.cell,
        "summary": summary,
        "candidate": decision.chosen.to_json() if decision.chosen else None,
        "subject_digest": loaded.subject.digest,
        "protocol_digest": loaded.protocol_digest,
        "objective": plan.objective,
        "tasks": [
            {"name": task.name, "criteria": [criterion.to_json() for criterion in task.criteria]}
            for task in plan.tasks
        ],
        "margins_left": _margins_left(decision),
        "alternatives": _alternatives(loaded, decision, cells),
        "confirmation": [
            {
                "task": task,
                "key": confirmed[task].record.key,
                "outcomes_digest": confirmed[task].record.detail.get("outcomes_digest"),
                **judgement.to_json(),
            }
            for task, judgement in decision.confirmation.items()
        ],
        "cells": [
            {
                "name": scheme.name,
                "task": task,
                "key": done.record.key,
                "status": done.record.status,
                "outcomes_digest": done.record.detail.get("outcomes_digest"),
                **decision.selection[task][scheme.name].to_json(),
            }
            for scheme, by_task in cells
            for task, done in by_task.items()
        ],
        "assumptions": _assumptions(loaded),
        "limits": [DEPLOYED_LIMIT if deployed else SIMULATED_LIMIT, *LIMITS],
        "bought": _bought(loaded, decision, cells, references),
        "target": target,
        "expires_after_days": plan.expires_after_days,
    }
    return body | {"digest": digest_json(body)}


def _target(loaded: Loaded, chosen: Scheme | None) -> dict[str, Any] | None:
    """The declared target, and why it could only simulate the chosen scheme; None where no cell
    names a backend, so that no target is declared."""
    settings = loaded.plan.deployment
    if settings is None:
        return None
    found = target(settings.target)
    why = found.why_simulated(chosen, loaded.sites) if chosen is not None else ""
    return {"declared": settings.target, **found.to_json(), "why_simulated": why}


def _bought(
    loaded: Loaded, decision: Decision, cells: Cells, references: Evaluations
) -> list[dict[str, Any]]:
    """What the chosen scheme saves, and what it costs in quality: each beside full precision."""
    if decision.chosen is None:
        return []
    done = next(by_task for scheme, by_task in cells if scheme == decision.chosen)
    rows = []
    for task in loaded.plan.tasks:
        name, own = task.evaluator.headline, done[task.name].record.metrics
        base = references[task.name].record.metrics
        if name in own and name in base:
            label = name if len(loaded.plan.tasks) == 1 else f"{name} · {task.name}"
            rows.append(_row(label, Interval.exact(base[name]), Interval.exact(own[name])))
    first = loaded.plan.tasks[0].name
    own, base = done[first], references[first]
    for name, value in own.resources.items():
        rows.append(_row(name, Interval.exact(base.resources[name]), Interval.exact(value)))
    for name, found in own.measured.items():
        if name in base.measured:
            rows.append(_row(name, base.measured[name], found))
    return rows


def _row(what: str, base: Interval, own: Interval) -> dict[str, Any]:
    ratio = own.over(base).to_json() if base.low > 0 else None
    return {"what": what, "reference": base.value, "chosen": own.value, "ratio": ratio}


def _margins_left(decision: Decision) -> list[dict[str, Any]]:
    """How far inside each criterion the confirmed scheme stays: the limit less the bound."""
    return [
        {
            "task": task,
            "criterion": finding.criterion.to_json(),
            "verdict": finding.verdict,
            "bound": bound,
            "left": limit - bound if bound is not None else None,
        }
        for task, judgement in decision.confirmation.items()
        for finding in judgement.findings
        for limit, bound in [_limit_and_bound(finding)]
    ]


def _limit_and_bound(finding: Finding) -> tuple[float, float | None]:
    rule = finding.criterion
    if rule.measured:
        return rule.margin, finding.measured.high if finding.measured else None
    if rule.counted:
        return rule.margin, finding.loss if rule.limit == "max_ratio" else finding.value
    return rule.largest_loss, finding.evidence.bound if finding.evidence else None


def _alternatives(loaded: Loaded, decision: Decision, cells: Cells) -> list[dict[str, Any]]:
    """Every scheme but the chosen one, and why it is not: the cheaper of the accepted first."""
    best = next((done for scheme, done in cells if scheme == decision.chosen), None)
    found = []
    for scheme, done in cells:
        if scheme == decision.chosen:
            continue
        verdict = decision.overall(scheme.name)
        if verdict == ACCEPT and loaded.plan.deploys and not scheme.deployed:
            why = ["it is a simulation: evidence for the cell that a backend runs"]
        elif verdict == ACCEPT and best is not None:
            why = [_costlier(loaded, done, best)]
        else:
            why = [
                f"{task}: {reason}" if len(done) > 1 else reason
                for task in done
                for judgement in [decision.selection[task][scheme.name]]
                if judgement.verdict == verdict
                for reason in judgement.reasons
            ]
        cost: float | None = objective(loaded.plan, next(iter(done.values())))
        cost = None if cost == math.inf else cost
        found.append(
            {"name": scheme.name, "verdict": verdict, loaded.plan.objective: cost, "why": why}
        )
    return sorted(
        found,
        key=lambda a: (
            a["verdict"] != ACCEPT,
            math.inf if a[loaded.plan.objective] is None else a[loaded.plan.objective],
        ),
    )


def _costlier(loaded: Loaded, done: Evaluations, best: Evaluations) -> str:
    """Why an accepted scheme lost to the chosen one: the first point in which it is behind."""
    plan = loaded.plan
    names = (plan.objective, "bit_operations", plan.tasks[0].evaluator.closeness)
    first, same = plan.tasks[0].name, ""
    ours, theirs = bounds(plan, done[first]), bounds(plan, best[first])
    if ours.value != theirs.value and ours.low <= theirs.high:
        same = f"{plan.objective} {ours.value:,.4g} and {theirs.value:,.4g} cannot be told apart; "
    for name, own, chosen in zip(names, price(plan, done), price(plan, best), strict=True):
        if own != chosen and not (same and name == plan.objective):
            ratio = f", {own / chosen:.3f} times" if chosen > 0 and name != names[2] else ""
            what = "distance to the reference by " if name == names[2] else ""
            if name != plan.objective:
                same = same or f"{plan.objective} is the same; "
            return f"{same}{what}{name} {own:,.6g} against {chosen:,.6g}{ratio}"
    return f"{same}equal in every point, and later in the matrix"


def _assumptions(loaded: Loaded) -> list[str]:
    """What the statistics take for granted, as far as this sweep used them."""
    plan = loaded.plan
    found = [
        "Examples of a split are independent draws of the data the subject will meet"
        + (
            "; those of one cluster may hang together."
            if any(task.cluster for task in plan.tasks)
            else "."
        ),
        "Calibration, selection and confirmation share no example: checked by content.",
        f"Verdicts on selection are corrected for {plan.cells} cells by Holm's method; the "
        "confirmation judges one scheme, on data that took no part in choosing it.",
    ]
    if any(plan.stops_early(task) for task in plan.tasks):
        found.append(
            f"Cells were looked at early, in an order drawn at random; {EARLY_SHARE:.0%} of each "
            "error level went to that. Where a criterion is neither binary nor a bounded mean, "
            "early looks rely on a central limit theorem."
        )
    if plan.mixed is not None or plan.sensitivity is not None:
        found.append(
            "Sensitivities, and the formats chosen by them, come from calibration examples alone."
        )
    found += [f"{note}." for note in loaded.notes]
    return found
