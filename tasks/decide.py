"""Decide: verdicts over the matrix, the cheapest accepted cell, and what the decision rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluators import EVALUATORS
from evaluators.acceptance import (
    ACCEPT,
    INCONCLUSIVE,
    REJECT,
    Candidate,
    Judgement,
    judge,
)
from halfstep.digest import digest_json
from halfstep.scheme import Scheme
from tasks.evaluated import Evaluated
from tasks.load import Loaded

LIMITS = (
    "Simulated numerics: values are rounded as the format rounds them; a deployed kernel may order "
    "its sums differently.",
    "A verdict holds for data like the selection and confirmation splits, and for nothing else.",
    "Residual adds, norms, activation functions and biases stay at full precision.",
)


@dataclass(frozen=True)
class Decision:
    """Which cell, if any, may be deployed."""

    verdict: str
    """The confirmation's verdict; without a candidate, what the matrix came to."""
    chosen: Scheme | None
    """The cell that went to confirmation."""
    selection: Mapping[str, Judgement]
    """By cell name."""
    confirmation: Judgement | None

    @property
    def cell(self) -> str | None:
        """The name of the cell that may be deployed."""
        return self.chosen.name if self.chosen and self.verdict == ACCEPT else None

    @property
    def summary(self) -> str:
        """One sentence."""
        if self.chosen is None:
            undecided = sum(j.verdict == INCONCLUSIVE for j in self.selection.values())
            if self.verdict == INCONCLUSIVE:
                return f"No cell was accepted; {undecided} could not be decided with these examples"
            return "No cell was accepted: every one is worse than its criteria allow"
        if self.verdict == ACCEPT:
            return f"{self.chosen.name} may be deployed: accepted on selection, and confirmed"
        word = "was refuted" if self.verdict == REJECT else "could not be confirmed"
        return f"{self.chosen.name} was accepted on selection but {word} on confirmation"


def select(
    loaded: Loaded, reference: Evaluated, cells: Sequence[tuple[Scheme, Evaluated]]
) -> tuple[dict[str, Judgement], Scheme | None]:
    """Verdicts of all cells on the selection split, and the cheapest accepted one.

    Of equally cheap cells the one with fewer bit-operations is taken, then the one closest to the
    reference, then the first of the matrix.
    """
    plan = loaded.plan
    evaluator = EVALUATORS[plan.task.evaluator]
    judgements = _judge(loaded, reference, cells)
    accepted = [
        (scheme, done) for scheme, done in cells if judgements[scheme.name].verdict == ACCEPT
    ]
    cheapest = min(
        accepted,
        key=lambda cell: (
            cell[1].resources[plan.objective],
            cell[1].resources["bit_operations"],
            cell[1].record.metrics.get(evaluator.closeness, float("inf")),
        ),
        default=None,
    )
    return judgements, cheapest[0] if cheapest else None


def conclude(
    loaded: Loaded,
    selection: Mapping[str, Judgement],
    chosen: Scheme | None,
    reference: Evaluated,
    confirmed: Evaluated | None,
) -> Decision:
    """The decision. Without a chosen cell there was nothing to confirm."""
    if chosen is None or confirmed is None:
        open_verdicts = any(j.verdict == INCONCLUSIVE for j in selection.values())
        return Decision(INCONCLUSIVE if open_verdicts else REJECT, None, selection, None)
    judgement = _judge(loaded, reference, [(chosen, confirmed)])[chosen.name]
    return Decision(judgement.verdict, chosen, selection, judgement)


def decision_json(
    loaded: Loaded,
    decision: Decision,
    cells: Sequence[tuple[Scheme, Evaluated]],
    confirmed: Evaluated | None,
) -> dict[str, object]:
    """The decision record: free of times and run ids, so that equal evidence gives equal bytes."""
    body: dict[str, object] = {
        "schema": "halfstep-decision/1",
        "verdict": decision.verdict,
        "cell": decision.cell,
        "summary": decision.summary,
        "candidate": decision.chosen.to_json() if decision.chosen else None,
        "subject_digest": loaded.subject.digest,
        "protocol_digest": loaded.protocol_digest,
        "objective": loaded.plan.objective,
        "criteria": [criterion.to_json() for criterion in loaded.plan.task.criteria],
        "confirmation": _judgement_json(decision.confirmation) if decision.confirmation else None,
        "confirmation_outcomes_digest": confirmed.record.detail.get("outcomes_digest")
        if confirmed
        else None,
        "cells": [
            {
                "name": scheme.name,
                "key": done.record.key,
                "status": done.record.status,
                "outcomes_digest": done.record.detail.get("outcomes_digest"),
                **_judgement_json(decision.selection[scheme.name]),
            }
            for scheme, done in cells
        ],
        "limits": list(LIMITS),
    }
    return body | {"digest": digest_json(body)}


def _judgement_json(judgement: Judgement) -> dict[str, object]:
    return {
        "verdict": judgement.verdict,
        "reasons": list(judgement.reasons),
        "findings": [finding.to_json() for finding in judgement.findings],
    }


def _judge(
    loaded: Loaded, reference: Evaluated, cells: Sequence[tuple[Scheme, Evaluated]]
) -> dict[str, Judgement]:
    assert reference.outcomes is not None
    plan = loaded.plan
    judged = judge(
        [
            Candidate(scheme.name, done.outcomes, done.resources)
            for scheme, done in cells
            if done.outcomes is not None
        ],
        Candidate("reference", reference.outcomes, reference.resources),
        plan.task.criteria,
        EVALUATORS[plan.task.evaluator].metrics,
    )
    return {
        scheme.name: judged[scheme.name]
        if scheme.name in judged
        else Judgement(REJECT, (), (f"the cell failed: {done.record.detail['error']}",))
        for scheme, done in cells
    }
