"""Acceptance: from criteria declared beforehand to a verdict of three values for each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evaluators.contrast import ALONE, RELATIVE
from evaluators.criterion import FOR_HIGHER, MAX_RATIO, Criterion
from evaluators.metric import Evidence, Metric, Outcomes
from evaluators.slices import slices
from evaluators.stopping import EXAMPLE, Stop
from halfstep.interval import Interval

ACCEPT, REJECT, INCONCLUSIVE = "accept", "reject", "inconclusive"


@dataclass(frozen=True)
class Candidate:
    """What acceptance needs to know of a cell, or of the reference."""

    name: str
    outcomes: Outcomes
    resources: Mapping[str, float]
    stopped: Stop | None = None
    """Where its verdict was certain before all examples were seen."""
    measured: Mapping[str, Interval] = field(default_factory=dict)
    """Resources that were measured; none where no backend runs it: then criteria of these are not
    asked."""


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
    early_share: float = 0.0
    """The share of the error level that early looks at the cells have used."""


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
    measured: Interval | None = None
    """Of a measured resource: the value, or its ratio to the reference's, between bounds."""
    note: str = ""
    """Why a resource could not be judged."""

    @property
    def reason(self) -> str:
        """One sentence for people."""
        rule = self.criterion
        if self.note:
            return self.note
        if rule.measured:
            return self._measured_text()
        if rule.counted:
            word = "within" if self.verdict == ACCEPT else "over"
            if rule.limit == MAX_RATIO:
                text = f"{rule.metric} is {self.loss:.3f} of the reference"
                return f"{text}: {word} {rule.margin:g}"
            return f"{rule.metric} is {self.value:,.0f}: {word} {rule.margin:,.0f}"
        bound = self.evidence.bound if self.evidence else None
        text = self._loss_text(bound)
        if self.evidence and self.evidence.note:
            text += f" ({self.evidence.note})"
        if self.verdict == INCONCLUSIVE:
            alone = bound is not None and bound < rule.largest_loss
            text += f"; not proven among {self.weighed_against} cells" if alone else "; undecided"
            text += (
                f", about {self.examples_needed:,} examples would settle it"
                if self.examples_needed
                else ", and more examples like these would not settle it"
            )
        return text

    def _measured_text(self) -> str:
        rule, found = self.criterion, self.measured
        assert found is not None
        word = {ACCEPT: "within", REJECT: "over", INCONCLUSIVE: "not surely within"}[self.verdict]
        of = " of the reference" if rule.limit == MAX_RATIO else ""
        spread = f" ({found.low:,.4g} to {found.high:,.4g})" if found.low < found.high else ""
        return f"{rule.metric} is {found.value:,.4g}{spread}{of}: {word} {rule.margin:,.4g}"

    def _loss_text(self, bound: float | None) -> str:
        """The loss, its bound and the limit."""
        rule = self.criterion
        drops = rule.limit in FOR_HIGHER
        where = ""
        if self.slices:
            worst = self.slices[0]
            where = (
                f" where {rule.slice} is {worst.value} ({worst.examples} examples, the worst of "
                f"{len(self.slices)} slices)"
            )
        if rule.kind == ALONE:
            text = f"{rule.metric} {self.value:.4f}{where}"
            if bound is not None:
                side, sign = ("least", -1) if drops else ("most", 1)
                text += f", at {side} {rule.margin + sign * bound:.4f} at {rule.confidence:.0%}"
            return f"{text}, {rule.limit} {rule.margin:g}"
        word, show = "drop" if drops else "increase", "{:+.4f}"
        margin = f"{rule.margin:g}"
        if rule.kind == RELATIVE:
            word, show, margin = f"relative {word}", "{:+.2%}", f"{100 * rule.margin:g}%"
        text = f"{rule.metric} {word} {show.format(self.loss)}{where}"
        if bound is not None:
            text += f", at most {show.format(bound)} at {rule.confidence:.0%}"
        return f"{text}, margin {margin}"

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
            **({"measured": self.measured.to_json()} if self.measured else {}),
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
    level: float
    """What is left of the criterion's own level."""
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

    Where cells were looked at early, a share of the error level went to that: a cell that stopped
    is judged by what it showed then, at that share; the others by the tests on all examples, at
    what is left. The two together err no more often than the whole level allows.
    """
    judgements: dict[str, dict[str, Judgement]] = {}
    family: list[tuple[str, Candidate, list[Finding], list[Tested]]] = []
    for trial in trials:
        counted = {
            c.name: [
                _measure(c, trial.reference, r)
                if r.measured
                else _count(c.resources, trial.reference.resources, r)
                for r in trial.criteria
                # What is measured of deployed cells alone is not asked of a simulation.
                if r.counted and (c.measured or not r.measured)
            ]
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
            and not any(finding.verdict == REJECT for finding in counted[c.name])
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
        if verdict == ACCEPT and any(finding.verdict != ACCEPT for finding in counts):
            verdict = INCONCLUSIVE
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
    return float(getattr(test.evidence, p)) / test.level


def ruled_out(
    resources: Mapping[str, float], reference: Mapping[str, float], criteria: Sequence[Criterion]
) -> str:
    """Which counted criterion a cell fails whatever it shows; empty where none."""
    found = [
        _count(resources, reference, rule)
        for rule in criteria
        if rule.counted and not rule.measured
    ]
    return "; ".join(finding.reason for finding in found if finding.verdict == REJECT)


def _count(
    resources: Mapping[str, float], reference: Mapping[str, float], rule: Criterion
) -> Finding:
    value, base = resources[rule.metric], reference[rule.metric]
    most = rule.margin * base if rule.limit == MAX_RATIO else rule.margin
    return Finding(rule, ACCEPT if value <= most else REJECT, base, value, value / base)


def _measure(cell: Candidate, reference: Candidate, rule: Criterion) -> Finding:
    """A measured resource against its limit: three-valued, because it lies between bounds."""
    found, base = cell.measured.get(rule.metric), reference.measured.get(rule.metric)
    if found is None or (rule.limit == MAX_RATIO and base is None):
        note = f"{rule.metric} is not known; the notes of the deployment say why"
        return Finding(rule, INCONCLUSIVE, 0.0, 0.0, 0.0, note=note)
    value, reference_value = found.value, base.value if base else 0.0
    if rule.limit == MAX_RATIO:
        assert base is not None
        found = found.over(base)
    verdict = INCONCLUSIVE
    if found.high <= rule.margin:
        verdict = ACCEPT
    elif found.low > rule.margin:
        verdict = REJECT
    return Finding(rule, verdict, reference_value, value, found.value, measured=found)


def _test(cells: Sequence[Candidate], trial: Trial, rule: Criterion) -> list[Tested]:
    """One criterion's evidence for each cell."""
    whole = [cell for cell in cells if cell.stopped is None]
    tested = dict(
        zip(
            [cell.name for cell in whole],
            _test_whole([cell.outcomes for cell in whole], trial, rule) if whole else [],
            strict=True,
        )
    )
    return [tested.get(cell.name) or _test_stopped(cell, trial, rule) for cell in cells]


def _test_stopped(cell: Candidate, trial: Trial, rule: Criterion) -> Tested:
    """What a cell had shown when it stopped."""
    assert cell.stopped is not None
    metric = trial.metrics[rule.metric]
    theirs = trial.reference.outcomes.take(cell.outcomes[EXAMPLE])
    value, base = metric.value(cell.outcomes, theirs), metric.value(theirs, theirs)
    p_accept, p_reject = cell.stopped.p_values[rule.label]
    evidence = Evidence(None, p_accept, p_reject, lambda level: None, str(cell.stopped))
    loss = metric.contrast(rule.kind, rule.margin).loss(value, base)
    return Tested(rule, base, value, float(loss), evidence, rule.level * trial.early_share)


def _test_whole(ours: Sequence[Outcomes], trial: Trial, rule: Criterion) -> list[Tested]:
    metric, theirs = trial.metrics[rule.metric], trial.reference.outcomes
    level = rule.level * (1 - trial.early_share)
    if rule.slice is None:
        return _compare(metric, ours, theirs, rule, level)
    members = slices(theirs, rule.slice, rule.min_examples)
    found = {
        value: _compare(metric, [o.take(which) for o in ours], theirs.take(which), rule, level)
        for value, which in members.items()
    }
    sizes = {value: len(which) for value, which in members.items()}
    return [
        _worst({value: tests[i] for value, tests in found.items()}, sizes, len(theirs), rule)
        for i in range(len(ours))
    ]


def _compare(
    metric: Metric, ours: Sequence[Outcomes], theirs: Outcomes, rule: Criterion, level: float
) -> list[Tested]:
    assert metric.test is not None
    contrast = metric.contrast(rule.kind, rule.margin)
    base = metric.value(theirs, theirs)
    values = [metric.value(outcomes, theirs) for outcomes in ours]
    evidence = metric.test.evidence(
        [metric.statistic(outcomes, theirs) for outcomes in ours],
        metric.against(theirs, contrast),
        rule.confidence,
    )
    return [
        Tested(rule, base, value, float(contrast.loss(value, base)), found, level)
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
    return Tested(rule, worst.reference, worst.value, worst.loss, evidence, worst.level, ordered)


def _settle(test: Tested, verdict: str, up: Corrected, down: Corrected, tests: int) -> Finding:
    """A criterion's own verdict, at the level that the correction left to its cell."""
    rule, evidence = test.criterion, test.evidence
    own = INCONCLUSIVE
    if verdict == ACCEPT or _ratio(test, "p_accept") * up.weight <= 1:
        own = ACCEPT
    elif verdict == REJECT and _ratio(test, "p_reject") * tests * down.weight <= 1:
        own = REJECT
    harmed = evidence.p_reject < evidence.p_accept
    level = test.level / (tests * down.weight if harmed else up.weight)
    needed = evidence.needed(level) if own == INCONCLUSIVE else None
    return Finding(
        rule, own, test.reference, test.value, test.loss, evidence, needed, up.weight, test.slices
    )


def _too_many_unscored(cell: Candidate, trial: Trial) -> bool:
    return cell.outcomes.unscored > trial.max_unscored * len(trial.reference.outcomes)


def _ruled_out(cell: Candidate, findings: Sequence[Finding], trial: Trial) -> tuple[str, ...]:
    reasons = [finding.reason for finding in findings if finding.verdict == REJECT]
    if _too_many_unscored(cell, trial):
        limit = f"; at most {trial.max_unscored:.1%} may be" if trial.max_unscored else ""
        reasons.insert(
            0,
            f"{cell.outcomes.unscored} of {len(cell.outcomes)} examples could not be scored: "
            f"the outputs are NaN or infinite{limit}"
            + (f" ({cell.stopped})" if cell.stopped else ""),
        )
    return tuple(reasons)
