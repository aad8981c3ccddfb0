"""Decide: verdicts over the matrix, the cheapest accepted scheme, what the decision rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluators.acceptance import (
    ACCEPT,
    INCONCLUSIVE,
    REJECT,
    Candidate,
    Judgement,
    Trial,
    judge,
    overall,
)
from evaluators.stopping import EARLY_SHARE
from halfstep.digest import digest_json
from halfstep.scheme import Scheme
from tasks.evaluated import Evaluated
from tasks.load import Loaded
from tasks.plan import Task

LIMITS = (
    "Simulated numerics: values are rounded as the format rounds them; a deployed kernel may order "
    "its sums differently.",
    "A verdict holds for data like the selection and confirmation splits, and for nothing else.",
    "Residual adds, norms, activation functions and biases stay at full precision.",
)

Evaluations = Mapping[str, Evaluated]
"""One scheme's cells, by task."""
Judgements = Mapping[str, Mapping[str, Judgement]]
"""By task, then by the name of the scheme."""


@dataclass(frozen=True)
class Decision:
    """Which scheme, if any, may be deployed."""

    verdict: str
    """The confirmation's verdict; without a candidate, what the matrix came to."""
    chosen: Scheme | None
    """The scheme that went to confirmation."""
    selection: Judgements
    confirmation: Mapping[str, Judgement]
    """By task; empty where there was nothing to confirm."""

    @property
    def cell(self) -> str | None:
        """The name of the scheme that may be deployed."""
        return self.chosen.name if self.chosen and self.verdict == ACCEPT else None

    def overall(self, scheme: str) -> str:
        """A scheme's verdict over all tasks."""
        return overall([judgements[scheme].verdict for judgements in self.selection.values()])

    @property
    def summary(self) -> str:
        """One sentence."""
        tasks = len(self.selection)
        every = "" if tasks == 1 else f" on all {tasks} tasks"
        if self.chosen is None:
            names = next(iter(self.selection.values()))
            undecided = sum(self.overall(name) == INCONCLUSIVE for name in names)
            if self.verdict == INCONCLUSIVE:
                return (
                    f"No cell was accepted{every}; {undecided} could not be decided with these "
                    "examples"
                )
            return f"No cell was accepted{every}: every one is worse than its criteria allow"
        if self.verdict == ACCEPT:
            return (
                f"{self.chosen.name} may be deployed: accepted on selection, and confirmed{every}"
            )
        word = "was refuted" if self.verdict == REJECT else "could not be confirmed"
        on = [task for task, j in self.confirmation.items() if j.verdict == self.verdict]
        where = "" if tasks == 1 else f" of {', '.join(on)}"
        return f"{self.chosen.name} was accepted on selection but {word} on confirmation{where}"


def select(
    loaded: Loaded, references: Evaluations, cells: Sequence[tuple[Scheme, Evaluations]]
) -> tuple[Judgements, Scheme | None]:
    """Verdicts of all cells on the selection split, and the cheapest scheme that all tasks accept.

    Of equally cheap ones that with fewer bit-operations is taken, then the one closest to the
    reference (by the first task's measure of that), then the first of the matrix.
    """
    judgements = _judge(loaded, references, cells, early=True)
    accepted = [
        (scheme, done)
        for scheme, done in cells
        if overall([j[scheme.name].verdict for j in judgements.values()]) == ACCEPT
    ]
    task = loaded.plan.tasks[0]

    def price(cell: tuple[Scheme, Evaluations]) -> tuple[float, float, float]:
        done = cell[1][task.name]
        return (
            done.resources[loaded.plan.objective],
            done.resources["bit_operations"],
            distance(task, done),
        )

    cheapest = min(accepted, key=price, default=None)
    return judgements, cheapest[0] if cheapest else None


def distance(task: Task, done: Evaluated) -> float:
    """How far a cell is from the reference by the evaluator's own measure of that; infinite where
    it failed."""
    metric = task.evaluator.metrics[task.evaluator.closeness]
    found = done.record.metrics.get(metric.name)
    return float("inf") if found is None else float(metric.loss(found, 0.0))


def conclude(
    loaded: Loaded,
    selection: Judgements,
    chosen: Scheme | None,
    references: Evaluations,
    confirmed: Evaluations,
) -> Decision:
    """The decision. Without a chosen scheme there was nothing to confirm."""
    if chosen is None:
        undecided = Decision(INCONCLUSIVE, None, selection, {})
        names = next(iter(selection.values()))
        verdicts = {undecided.overall(name) for name in names}
        verdict = INCONCLUSIVE if INCONCLUSIVE in verdicts else REJECT
        return Decision(verdict, None, selection, {})
    judged = _judge(loaded, references, [(chosen, confirmed)], early=False)
    found = {task: judgements[chosen.name] for task, judgements in judged.items()}
    return Decision(overall([j.verdict for j in found.values()]), chosen, selection, found)


def decision_json(
    loaded: Loaded,
    decision: Decision,
    cells: Sequence[tuple[Scheme, Evaluations]],
    confirmed: Evaluations,
) -> dict[str, object]:
    """The decision record: free of times and run ids, so that equal evidence gives equal bytes."""
    body: dict[str, object] = {
        "schema": "halfstep-decision/2",
        "verdict": decision.verdict,
        "cell": decision.cell,
        "summary": decision.summary,
        "candidate": decision.chosen.to_json() if decision.chosen else None,
        "subject_digest": loaded.subject.digest,
        "protocol_digest": loaded.protocol_digest,
        "objective": loaded.plan.objective,
        "tasks": [
            {"name": task.name, "criteria": [criterion.to_json() for criterion in task.criteria]}
            for task in loaded.plan.tasks
        ],
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
        "limits": list(LIMITS),
    }
    return body | {"digest": digest_json(body)}


def _judge(
    loaded: Loaded,
    references: Evaluations,
    cells: Sequence[tuple[Scheme, Evaluations]],
    *,
    early: bool,
) -> dict[str, dict[str, Judgement]]:
    """``early``: whether cells were looked at before all examples were seen."""
    trials = []
    for task in loaded.plan.tasks:
        reference = references[task.name]
        assert reference.outcomes is not None
        candidates = [
            Candidate(scheme.name, outcomes, done[task.name].resources, done[task.name].stopped)
            for scheme, done in cells
            if (outcomes := done[task.name].outcomes) is not None
        ]
        trials.append(
            Trial(
                task.name,
                candidates,
                Candidate("reference", reference.outcomes, reference.resources),
                task.criteria,
                task.evaluator.metrics,
                task.max_unscored,
                EARLY_SHARE if early and loaded.plan.stops_early(task) else 0.0,
            )
        )
    judged = judge(trials)
    for scheme, done in cells:
        for task_name, evaluated in done.items():
            if scheme.name not in judged[task_name]:
                reason = f"the cell failed: {evaluated.record.detail['error']}"
                judged[task_name][scheme.name] = Judgement(REJECT, (), (reason,))
    return judged
