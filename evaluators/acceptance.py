"""Acceptance: from criteria declared beforehand to a verdict of three values for each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluators.metric import Evidence, Metric, Outcomes

ACCEPT, REJECT, INCONCLUSIVE = "accept", "reject", "inconclusive"

RESOURCES = ("weight_bytes", "bit_operations")
"""What a max_ratio criterion or the objective may name: counted from shapes, so not tested."""

LIMITS = ("max_drop", "max_increase", "max_ratio")


@dataclass(frozen=True)
class Criterion:
    """One acceptance rule: a metric may lose less than the margin; a resource stays in a ratio."""

    metric: str
    limit: str
    """One of `LIMITS`; max_drop where higher is better, max_increase where lower is."""
    margin: float
    confidence: float = 0.95

    @property
    def counted(self) -> bool:
        return self.limit == "max_ratio"

    @property
    def level(self) -> float:
        return 1 - self.confidence

    def to_json(self) -> dict[str, object]:
        rule: dict[str, object] = {"metric": self.metric, self.limit: self.margin}
        return rule if self.counted else rule | {"confidence": self.confidence}


@dataclass(frozen=True)
class Candidate:
    """What acceptance needs to know of a cell, or of the reference."""

    name: str
    outcomes: Outcomes
    resources: Mapping[str, float]


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

    @property
    def reason(self) -> str:
        """One sentence for people."""
        rule = self.criterion
        if rule.counted:
            word = "within" if self.verdict == ACCEPT else "over"
            return f"{rule.metric} is {self.loss:.3f} of the reference: {word} {rule.margin:g}"
        word = "drop" if rule.limit == "max_drop" else "increase"
        text = f"{rule.metric} {word} {self.loss:+.4f}"
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
        }


@dataclass(frozen=True)
class Judgement:
    """A cell's verdict and the findings it rests on."""

    verdict: str
    findings: tuple[Finding, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Tested:
    """A criterion's evidence for one cell, before the correction over the cells."""

    criterion: Criterion
    reference: float
    value: float
    loss: float
    evidence: Evidence


def judge(
    cells: Sequence[Candidate],
    reference: Candidate,
    criteria: Sequence[Criterion],
    metrics: Mapping[str, Metric],
) -> dict[str, Judgement]:
    """Verdicts for all cells of a matrix at once, by name.

    Accepted: every criterion shows a loss below its margin (an intersection-union test, so the
    largest of a cell's p-values counts), with Holm's correction over the cells. Rejected: a
    counted criterion fails, an example could not be scored, or a test shows a loss above its
    margin (Bonferroni over the cell's criteria, Holm over the cells). Else inconclusive.

    Cells that a counted criterion rules out are known before any data is seen; they do not weigh
    on the others.
    """
    counted = {c.name: [_count(c, reference, r) for r in criteria if r.counted] for c in cells}
    open_cells = [c for c in cells if not c.outcomes.unscored and _all_pass(counted[c.name])]
    tested = [_test(open_cells, reference, r, metrics) for r in criteria if not r.counted]
    rows = [[column[i] for column in tested] for i in range(len(open_cells))]
    accepting = holm([max((_ratio(t, "p_accept") for t in row), default=0.0) for row in rows])
    rejecting = holm(
        [min((_ratio(t, "p_reject") for t in row), default=math.inf) * len(row) for row in rows]
    )
    judgements = {
        c.name: Judgement(REJECT, tuple(counted[c.name]), _ruled_out(c, counted[c.name]))
        for c in cells
    }
    for cell, row, up, down in zip(open_cells, rows, accepting, rejecting, strict=True):
        verdict = ACCEPT if up.ratio <= 1 else REJECT if down.ratio <= 1 else INCONCLUSIVE
        findings = (*(_settle(t, verdict, up, down, len(row)) for t in row), *counted[cell.name])
        reasons = tuple(f.reason for f in findings if f.verdict == verdict)
        judgements[cell.name] = Judgement(verdict, findings, reasons)
    return judgements


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


def _all_pass(findings: Sequence[Finding]) -> bool:
    return all(finding.verdict == ACCEPT for finding in findings)


def _count(cell: Candidate, reference: Candidate, rule: Criterion) -> Finding:
    value, base = cell.resources[rule.metric], reference.resources[rule.metric]
    verdict = ACCEPT if value <= rule.margin * base else REJECT
    return Finding(rule, verdict, base, value, value / base)


def _test(
    cells: Sequence[Candidate],
    reference: Candidate,
    rule: Criterion,
    metrics: Mapping[str, Metric],
) -> list[Tested]:
    metric = metrics[rule.metric]
    if not cells or metric.test is None:
        return []
    base = metric.value(reference.outcomes, reference.outcomes)
    theirs = metric.features(reference.outcomes, reference.outcomes)
    ours = [metric.features(cell.outcomes, reference.outcomes) for cell in cells]
    values = [metric.value(cell.outcomes, reference.outcomes) for cell in cells]
    evidence = metric.test(metric, ours, theirs, rule.margin, rule.confidence)
    return [
        Tested(rule, base, value, metric.loss(value, base), found)
        for value, found in zip(values, evidence, strict=True)
    ]


def _settle(test: Tested, verdict: str, up: Corrected, down: Corrected, tests: int) -> Finding:
    """A criterion's own verdict, at the level that the correction left to its cell."""
    rule, evidence = test.criterion, test.evidence
    own = INCONCLUSIVE
    if verdict == ACCEPT or _ratio(test, "p_accept") * up.weight <= 1:
        own = ACCEPT
    elif verdict == REJECT and _ratio(test, "p_reject") * tests * down.weight <= 1:
        own = REJECT
    needed = evidence.needed(rule.level / up.weight) if own == INCONCLUSIVE else None
    return Finding(rule, own, test.reference, test.value, test.loss, evidence, needed, up.weight)


def _ruled_out(cell: Candidate, findings: Sequence[Finding]) -> tuple[str, ...]:
    reasons = [finding.reason for finding in findings if finding.verdict == REJECT]
    if cell.outcomes.unscored:
        reasons.insert(
            0,
            f"{cell.outcomes.unscored} of {len(cell.outcomes)} examples could not be scored: "
            "the outputs are NaN or infinite",
        )
    return tuple(reasons)
