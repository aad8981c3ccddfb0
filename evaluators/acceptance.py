"""Acceptance: from criteria declared beforehand to a verdict of three values for each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluators.metric import SLICE, Evidence, Metric, Outcomes

ACCEPT, REJECT, INCONCLUSIVE = "accept", "reject", "inconclusive"

RESOURCES = ("weight_bytes", "bit_operations")
"""What a max_ratio criterion or the objective may name: counted from shapes, so not tested."""

LIMITS = ("max_drop", "max_increase", "max_ratio")

FEWEST_IN_A_SLICE = 30


@dataclass(frozen=True)
class Criterion:
    """One acceptance rule: a metric may lose less than the margin; a resource stays in a ratio."""

    metric: str
    limit: str
    """One of `LIMITS`; max_drop where higher is better, max_increase where lower is."""
    margin: float
    confidence: float = 0.95
    slice: str | None = None
    """A column: the rule holds in every slice, a slice for each of its values."""
    min_examples: int = FEWEST_IN_A_SLICE
    """Slices with fewer are named and not judged."""

    @property
    def counted(self) -> bool:
        return self.limit == "max_ratio"

    @property
    def level(self) -> float:
        return 1 - self.confidence

    @property
    def label(self) -> str:
        """The metric, and the column whose slices it is taken in."""
        return f"{self.metric} by {self.slice}" if self.slice else self.metric

    def to_json(self) -> dict[str, object]:
        rule: dict[str, object] = {"metric": self.metric, self.limit: self.margin}
        if self.counted:
            return rule
        rule["confidence"] = self.confidence
        if self.slice is not None:
            rule |= {"slice": self.slice, "min_examples": self.min_examples}
        return rule


@dataclass(frozen=True)
class Candidate:
    """What acceptance needs to know of a cell, or of the reference."""

    name: str
    outcomes: Outcomes
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """One task: its criteria, the reference's outcomes, and those of the cells."""

    name: str
    cells: Sequence[Candidate]
    reference: Candidate
    criteria: Sequence[Criterion]
    metrics: Mapping[str, Metric]
    max_unscored: float = 0.0
    """The share of examples that may be unscored before a cell is ruled out."""


@dataclass(frozen=True)
class Part:
    """What a criterion found in one slice."""

    value: str
    examples: int
    reference: float
    metric: float
    loss: float
    bound: float | None
    p_accept: float
    p_reject: float
    """Corrected over the slices by Holm."""

    def to_json(self) -> dict[str, object]:
        return {
            "slice": self.value,
            "examples": self.examples,
            "reference": self.reference,
            "value": self.metric,
            "loss": self.loss,
            "bound": self.bound,
            "p_accept": self.p_accept,
            "p_reject": self.p_reject,
        }


@dataclass(frozen=True)
class Finding:
    """What one criterion found for one cell."""

    criterion: Criterion
    verdict: str
    reference: float
    value: float
    loss: float
    """How much worse than the reference; for a resource, its ratio to the reference's."""
    evidence: Evidence | None = None
    """None where the criterion is counted, not tested."""
    examples_needed: int | None = None
    weighed_against: int = 1
    """How many cells Holm's correction weighed this one against."""
    slices: tuple[Part, ...] = ()
    """One a slice, the one that decides first; none where the criterion is over all examples."""

    @property
    def reason(self) -> str:
        """One sentence for people."""
        rule = self.criterion
        if rule.counted:
            word = "within" if self.verdict == ACCEPT else "over"
            return f"{rule.metric} is {self.loss:.3f} of the reference: {word} {rule.margin:g}"
        word = "drop" if rule.limit == "max_drop" else "increase"
        text = f"{rule.metric} {word} {self.loss:+.4f}"
        if self.slices:
            worst = self.slices[0]
            text += (
                f" where {rule.slice} is {worst.value} ({worst.examples} examples, the worst of "
                f"{len(self.slices)} slices)"
            )
        if self.evidence and self.evidence.bound is not None:
            text += f", at most {self.evidence.bound:+.4f} at {rule.confidence:.0%}"
        text += f", margin {rule.margin:g}"
        if self.evidence and self.evidence.note:
            text += f" ({self.evidence.note})"
        if self.verdict == INCONCLUSIVE:
            bound = self.evidence.bound if self.evidence else None
            alone = bound is not None and bound < rule.margin
            text += f"; not proven among {self.weighed_against} cells" if alone else "; undecided"
            text += (
                f", about {self.examples_needed:,} examples would settle it"
                if self.examples_needed
                else ", and more examples like these would not settle it"
            )
        return text

    def to_json(self) -> dict[str, object]:
        return {
            "criterion": self.criterion.to_json(),
            "verdict": self.verdict,
            "reference": self.reference,
            "value": self.value,
            "loss": self.loss,
            "bound": self.evidence.bound if self.evidence else None,
            "p_accept": self.evidence.p_accept if self.evidence else None,
            "p_reject": self.evidence.p_reject if self.evidence else None,
            "examples_needed": self.examples_needed,
            "weighed_against": self.weighed_against,
            "reason": self.reason,
            **({"slices": [part.to_json() for part in self.slices]} if self.slices else {}),
        }


@dataclass(frozen=True)
class Judgement:
    """A cell's verdict and the findings it rests on."""

    verdict: str
    findings: tuple[Finding, ...]
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "findings": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True)
class Tested:
    """A criterion's evidence for one cell, before the correction over the cells."""

    criterion: Criterion
    reference: float
    value: float
    loss: float
    evidence: Evidence
    slices: tuple[Part, ...] = ()


def judge(trials: Sequence[Trial]) -> dict[str, dict[str, Judgement]]:
    """Verdicts for all cells of all tasks at once, by the names of task and cell.

    Accepted: every criterion shows a loss below its margin (an intersection-union test, so the
    largest of a cell's p-values counts), with Holm's correction over the cells of all tasks.
    Rejected: a counted criterion fails, more examples than allowed could not be scored, or a test
    shows a loss above its margin (Bonferroni over the cell's criteria, Holm over the cells). Else
    inconclusive.

    Cells that a counted criterion rules out are known before any data is seen; they do not weigh
    on the others.
    """
    judgements: dict[str, dict[str, Judgement]] = {}
    family: list[tuple[str, Candidate, list[Finding], list[Tested]]] = []
    for trial in trials:
        counted = {
            c.name: [_count(c, trial.reference, r) for r in trial.criteria if r.counted]
            for c in trial.cells
        }
        judgements[trial.name] = {
            c.name: Judgement(REJECT, tuple(counted[c.name]), _ruled_out(c, counted[c.name], trial))
            for c in trial.cells
        }
        left = [
            c
            for c in trial.cells
            if not _too_many_unscored(c, trial)
            and all(finding.verdict == ACCEPT for finding in counted[c.name])
        ]
        columns = [_test(left, trial, r) for r in trial.criteria if not r.counted]
        for i, cell in enumerate(left):
            family.append((trial.name, cell, counted[cell.name], [c[i] for c in columns]))
    tested = [row for *_, row in family]
    accepting = holm([max((_ratio(t, "p_accept") for t in row), default=0.0) for row in tested])
    rejecting = holm(
        [min((_ratio(t, "p_reject") for t in row), default=math.inf) * len(row) for row in tested]
    )
    for (name, cell, counts, row), up, down in zip(family, accepting, rejecting, strict=True):
        verdict = ACCEPT if up.ratio <= 1 else REJECT if down.ratio <= 1 else INCONCLUSIVE
        findings = (*(_settle(t, verdict, up, down, len(row)) for t in row), *counts)
        reasons = tuple(f.reason for f in findings if f.verdict == verdict)
        judgements[name][cell.name] = Judgement(verdict, findings, reasons)
    return judgements


def overall(verdicts: Sequence[str]) -> str:
    """Of one scheme over all tasks: what fails one is rejected, what passes all is accepted."""
    if REJECT in verdicts:
        return REJECT
    return ACCEPT if all(verdict == ACCEPT for verdict in verdicts) else INCONCLUSIVE


@dataclass(frozen=True)
class Corrected:
    """A p-value as a multiple of its level, corrected for the family it stands in."""

    ratio: float
    """The hypothesis is rejected where this is at most 1."""
    weight: int
    """How many hypotheses it was weighed against."""


def holm(ratios: Sequence[float]) -> list[Corrected]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979, 65-70).

    >>> [c.ratio for c in holm([0.2, 0.9, 0.5])]
    [0.6000000000000001, 1.0, 1.0]
    """
    result: dict[int, Corrected] = {}
    worst = 0.0
    for position, i in enumerate(sorted(range(len(ratios)), key=lambda i: ratios[i])):
        weight = len(ratios) - position
        worst = max(worst, ratios[i] * weight)
        result[i] = Corrected(worst, weight)
    return [result[i] for i in range(len(ratios))]


def _ratio(test: Tested, p: str) -> float:
    return float(getattr(test.evidence, p)) / test.criterion.level


def _count(cell: Candidate, reference: Candidate, rule: Criterion) -> Finding:
    value, base = cell.resources[rule.metric], reference.resources[rule.metric]
    verdict = ACCEPT if value <= rule.margin * base else REJECT
    return Finding(rule, verdict, base, value, value / base)


def _test(cells: Sequence[Candidate], trial: Trial, rule: Criterion) -> list[Tested]:
    """One criterion's evidence for each cell."""
    metric, theirs = trial.metrics[rule.metric], trial.reference.outcomes
    ours = [cell.outcomes for cell in cells]
    if not cells:
        return []
    if rule.slice is None:
        return _compare(metric, ours, theirs, rule)
    members = {
        value: which
        for value, which in slices(theirs, rule.slice).items()
        if len(which) >= rule.min_examples
    }
    found = {
        value: _compare(metric, [o.take(which) for o in ours], theirs.take(which), rule)
        for value, which in members.items()
    }
    sizes = {value: len(which) for value, which in members.items()}
    return [
        _worst({value: tests[i] for value, tests in found.items()}, sizes, len(theirs), rule)
        for i in range(len(cells))
    ]


def slices(outcomes: Outcomes, column: str) -> dict[str, np.ndarray]:
    """Which examples have each value of a column, in order of the values."""
    values, which = np.unique(outcomes[SLICE + column], return_inverse=True)
    return {str(value): np.flatnonzero(which == i) for i, value in enumerate(values)}


def _compare(
    metric: Metric, ours: Sequence[Outcomes], theirs: Outcomes, rule: Criterion
) -> list[Tested]:
    assert metric.test is not None
    base = metric.value(theirs, theirs)
    values = [metric.value(outcomes, theirs) for outcomes in ours]
    evidence = metric.test(
        metric,
        [metric.statistic(outcomes, theirs) for outcomes in ours],
        metric.statistic(theirs, theirs),
        metric.design(theirs),
        rule.margin,
        rule.confidence,
    )
    return [
        Tested(rule, base, value, metric.loss(value, base), found)
        for value, found in zip(values, evidence, strict=True)
    ]


def _worst(
    tests: Mapping[str, Tested], sizes: Mapping[str, int], examples: int, rule: Criterion
) -> Tested:
    """One test of all slices. Every slice has to pass, so the largest p-value accepts (an
    intersection-union test, with no correction); one harmed slice is enough to reject, so the
    smallest one is corrected over the slices."""
    corrected = holm([test.evidence.p_reject for test in tests.values()])
    parts = {
        value: Part(
            value, sizes[value], test.reference, test.value, test.loss, test.evidence.bound,
            test.evidence.p_accept, min(1.0, harm.ratio),
        )
        for (value, test), harm in zip(tests.items(), corrected, strict=True)
    }  # fmt: skip
    deciding = max(tests, key=lambda value: (tests[value].evidence.p_accept, tests[value].loss))
    worst = tests[deciding]
    bounds = [test.evidence.bound for test in tests.values() if test.evidence.bound is not None]

    def needed(level: float) -> int | None:
        count = worst.evidence.needed(level)
        return None if count is None else math.ceil(count * examples / sizes[deciding])

    evidence = Evidence(
        max(bounds, default=None),
        worst.evidence.p_accept,
        min(part.p_reject for part in parts.values()),
        needed,
        "every slice must pass by itself",
    )
    ordered = (parts.pop(deciding), *parts.values())
    return Tested(rule, worst.reference, worst.value, worst.loss, evidence, ordered)


def _settle(test: Tested, verdict: str, up: Corrected, down: Corrected, tests: int) -> Finding:
    """A criterion's own verdict, at the level that the correction left to its cell."""
    rule, evidence = test.criterion, test.evidence
    own = INCONCLUSIVE
    if verdict == ACCEPT or _ratio(test, "p_accept") * up.weight <= 1:
        own = ACCEPT
    elif verdict == REJECT and _ratio(test, "p_reject") * tests * down.weight <= 1:
        own = REJECT
    needed = evidence.needed(rule.level / up.weight) if own == INCONCLUSIVE else None
    return Finding(
        rule, own, test.reference, test.value, test.loss, evidence, needed, up.weight, test.slices
    )


def _too_many_unscored(cell: Candidate, trial: Trial) -> bool:
    return cell.outcomes.unscored > trial.max_unscored * len(cell.outcomes)


def _ruled_out(cell: Candidate, findings: Sequence[Finding], trial: Trial) -> tuple[str, ...]:
    reasons = [finding.reason for finding in findings if finding.verdict == REJECT]
    if _too_many_unscored(cell, trial):
        limit = f"; at most {trial.max_unscored:.1%} may be" if trial.max_unscored else ""
        reasons.insert(
            0,
            f"{cell.outcomes.unscored} of {len(cell.outcomes)} examples could not be scored: "
            f"the outputs are NaN or infinite{limit}",
        )
    return tuple(reasons)
