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
from halfstep.interval import Interval
from halfstep.scheme import Scheme
from tasks.evaluated import Evaluated
from tasks.load import Loaded
from tasks.plan import Plan, Task

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

    Of equally cheap ones, and of those that a measured objective cannot tell apart, that with fewer
    bit-operations is taken, then the one closest to the reference (by the first task's measure of
    that), then the first of the matrix. Where backends run some schemes only those can be chosen: a
    simulation is evidence, not an artefact.
    """
    judgements = _judge(loaded, references, cells, early=True)
    accepted = [
        (scheme, done)
        for scheme, done in cells
        if overall([j[scheme.name].verdict for j in judgements.values()]) == ACCEPT
        and (scheme.deployed or not loaded.plan.deploys)
    ]
    return judgements, cheapest(loaded.plan, accepted)


def cheapest(plan: Plan, accepted: Sequence[tuple[Scheme, Evaluations]]) -> Scheme | None:
    """The first by price of those whose objective may be the least, as far as its bounds tell."""
    if not accepted:
        return None
    name = plan.tasks[0].name
    least = min(objective(plan, done[name]) for _, done in accepted)
    first = next(d[name] for _, d in accepted if objective(plan, d[name]) == least)
    near = [
        cell for cell in accepted if bounds(plan, cell[1][name]).low <= bounds(plan, first).high
    ]
    return min(near, key=lambda cell: price(plan, cell[1])[1:])[0]


def price(plan: Plan, done: Evaluations) -> tuple[float, float, float]:
    """What accepted schemes are chosen by, the smallest first: the objective, bit-operations, and
    the distance to the reference on the first task."""
    first = plan.tasks[0]
    own = done[first.name]
    return (
        objective(plan, own),
        own.resources["bit_operations"],
        distance(first, own),
    )


def bounds(plan: Plan, done: Evaluated) -> Interval:
    """The objective between its bounds; exact where it is counted."""
    return done.measured.get(plan.objective) or Interval.exact(objective(plan, done))


def objective(plan: Plan, done: Evaluated) -> float:
    """What makes one accepted cell cheaper than another; infinite where it is not known."""
    found = done.measured.get(plan.objective)
    return found.value if found else float(done.resources.get(plan.objective, float("inf")))


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether another point is at least as small in both and smaller in one: not on the front."""
    return [any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]


def distance(task: Task, done: Evaluated) -> float:
    """How far a cell is from the reference by the evaluator's own measure of that, 0 where it does
    the same; infinite where it failed."""
    metric = task.evaluator.metrics[task.evaluator.closeness]
    found = done.record.metrics.get(metric.name)
    best = 1.0 if metric.higher_is_better else 0.0
    return float("inf") if found is None else float(metric.loss(found, best))


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
            Candidate(
                scheme.name,
                outcomes,
                done[task.name].resources,
                done[task.name].stopped,
                done[task.name].measured,
            )
            for scheme, done in cells
            if (outcomes := done[task.name].outcomes) is not None
        ]
        trials.append(
            Trial(
                task.name,
                candidates,
                Candidate(
                    "reference",
                    reference.outcomes,
                    reference.resources,
                    measured=reference.measured,
                ),
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
