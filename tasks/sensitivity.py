"""Sensitivity: what each site of a scheme costs by itself, and what giving it back would gain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from evaluators.bootstrap import Bootstrap, paired_bootstrap, resampling_counts
from evaluators.evaluator import Evaluator
from evaluators.metric import Metric, Outcomes
from halfstep.apply import Treatment
from halfstep.examples import Examples
from halfstep.parts import Part, parts
from halfstep.replay import Answers, Branches
from halfstep.scheme import Scheme
from halfstep.treatments import Treatments
from tasks.evaluated import finite, recorded
from tasks.load import Loaded
from tasks.plan import Task
from tasks.stopwatch import Stopwatch

KIND = "sensitivity"
TABLE = "sensitivity.csv"
RESAMPLES = 2_000
INTERVAL = 0.9
"""Of every interval that is given here, two-sided."""
_SEED = 20260419


@dataclass(frozen=True, eq=False)
class Probe:
    """The examples that sites are probed on, and what the subject makes of them.

    Calibration examples: probing chooses nothing on the data that will judge what was chosen.
    """

    task: Task
    examples: Examples
    batch_size: int

    @property
    def evaluator(self) -> Evaluator:
        return self.task.evaluator

    @property
    def headline(self) -> Metric:
        return self.evaluator.metrics[self.evaluator.headline]

    def loss(self, outcomes: Outcomes, reference: Outcomes) -> float:
        """How much worse the headline metric is than the reference's."""
        metric = self.headline
        return float(
            metric.loss(metric.value(outcomes, reference), metric.value(reference, reference))
        )

    def branch(
        self,
        loaded: Loaded,
        base: Treatment,
        variants: Sequence[Treatment],
        target: Sequence[Any] | None = None,
    ) -> tuple[Branches, Outcomes]:
        """All variants in one evaluation, and the base's outcomes."""
        branches = Branches(loaded.model, base, variants, target)
        outcomes = self.evaluator.run(branches, self.examples, self.batch_size)
        return branches, outcomes

    def outcomes(self, answers: Sequence[Any], reference: Outcomes) -> Outcomes:
        """Of a variant, from its answers."""
        model = Answers(answers)
        return self.evaluator.run(model, self.examples, self.batch_size, reference=reference)


def probe(loaded: Loaded, examples: int) -> Probe:
    """A seeded sample of the first task's calibration split that there is."""
    name = next(n for n, data in loaded.data.tasks.items() if "calibration" in data.splits)
    split = loaded.split(name, "calibration")
    order = np.random.default_rng(_SEED).permutation(len(split))[:examples]
    return Probe(loaded.task(name), split.take(np.sort(order)), loaded.plan.compute.batch_size)


@dataclass(frozen=True)
class Effect:
    """What a treatment does to the task's metric: a loss against the full-precision subject's."""

    loss: float
    low: float | None
    high: float | None
    """None where no outcome differs."""


@dataclass(frozen=True)
class Row:
    """One site."""

    part: Part
    error: float
    """Mean squared distance of the outputs to full precision's, over their mean square, where this
    site alone is quantized."""
    error_low: float
    error_high: float
    rank: int
    rank_low: int
    rank_high: int
    effect: Effect
    restored_error: float
    """The same distance where every site of the scheme but this one is quantized."""
    gain: float
    """The share of the scheme's error that goes where this site is given back."""
    restored_effect: Effect

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "rank_low": self.rank_low,
            "rank_high": self.rank_high,
            "site": self.part.site,
            "side": self.part.side,
            "kind": self.part.kind,
            "end": self.part.end,
            "spec": str(self.part.spec),
            "output_error": self.error,
            "output_error_low": self.error_low,
            "output_error_high": self.error_high,
            "metric_loss": self.effect.loss,
            "metric_loss_low": self.effect.low,
            "metric_loss_high": self.effect.high,
            "restored_output_error": self.restored_error,
            "error_gained_back": self.gain,
            "restored_metric_loss": self.restored_effect.loss,
            "restored_metric_loss_low": self.restored_effect.low,
            "restored_metric_loss_high": self.restored_effect.high,
        }


@dataclass(frozen=True)
class Sensitivity:
    """Every site of one scheme, the most costly first."""

    scheme: Scheme
    task: str
    metric: str
    examples: int
    rows: tuple[Row, ...]
    error: float
    """Of the whole scheme."""
    effect: Effect
    """Of the whole scheme."""
    repeatable: bool

    @property
    def sum_of_errors(self) -> float:
        """What the whole would be if errors simply added up."""
        return sum(row.error for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme.name,
            "task": self.task,
            "metric": self.metric,
            "examples": self.examples,
            "output_error": self.error,
            "sum_of_errors": self.sum_of_errors,
            "metric_loss": self.effect.loss,
            "metric_loss_low": self.effect.low,
            "metric_loss_high": self.effect.high,
            "reused_passes": self.repeatable,
            "sites": [row.to_json() for row in self.rows],
        }


def analyse(loaded: Loaded, treatments: Treatments, scheme: Scheme, examples: int) -> Sensitivity:
    """Probes every site of a scheme."""
    on = probe(loaded, examples)
    found = parts(treatments, loaded.sites, scheme)
    plain, full = treatments.unquantized(scheme), treatments.for_scheme(scheme)
    alone, reference = on.branch(loaded, plain, [part.alone for part in found])
    target = alone.base_answers
    restored, whole = on.branch(loaded, full, [part.restored for part in found], target)
    whole_error = float(restored.errors[0].mean())
    errors, others = alone.errors[1:].numpy(), restored.errors[1:].numpy()
    low, high, ranks = _ranked(errors)
    order = np.argsort(-errors.mean(axis=1), kind="stable")
    effects, restored_effects = (
        _effects(on, [on.outcomes(given, reference) for given in side.answers], reference)
        for side in (alone, restored)
    )
    rows = [
        Row(
            found[i],
            float(errors[i].mean()),
            float(low[i]),
            float(high[i]),
            rank,
            int(ranks[0][i]),
            int(ranks[1][i]),
            effects[i],
            float(others[i].mean()),
            1 - float(others[i].mean()) / whole_error if whole_error > 0 else 0.0,
            restored_effects[i],
        )
        for rank, i in enumerate(order.tolist(), 1)
    ]
    return Sensitivity(
        scheme,
        on.task.name,
        on.headline.name,
        len(on.examples),
        tuple(rows),
        whole_error,
        _effects(on, [whole], reference)[0],
        alone.repeatable and restored.repeatable,
    )


def _ranked(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Intervals of each site's mean error, and of its rank, by resampling the rows."""
    means = np.concatenate(
        [counts @ errors.T / errors.shape[1]
         for counts in resampling_counts(errors.shape[1], RESAMPLES)]
    )  # fmt: skip
    ranks = (-means).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") + 1
    ends = [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]
    low, high = np.quantile(means, ends, axis=0)
    first, last = np.quantile(ranks, ends, axis=0, method="nearest")
    return low, high, (first, last)


def _effects(on: Probe, cells: Sequence[Outcomes], reference: Outcomes) -> list[Effect]:
    metric = on.headline
    drawn = paired_bootstrap(
        [metric.statistic(cell, reference) for cell in cells],
        metric.statistic(reference, reference),
        metric.design(reference),
        metric.loss,
        RESAMPLES,
    )
    return [
        Effect(on.loss(cell, reference), *_interval(sample))
        for cell, sample in zip(cells, drawn, strict=True)
    ]


def _interval(sample: Bootstrap) -> tuple[float | None, float | None]:
    if sample.degenerate:
        return None, None
    return sample.quantile((1 - INTERVAL) / 2), sample.quantile((1 + INTERVAL) / 2)


def run_sensitivity(
    loaded: Loaded, treatments: Treatments, scheme: Scheme, examples: int, sweep: SweepFolder
) -> tuple[Record, Path]:
    """The analysis, recorded; what is recorded already is taken from there."""
    key = loaded.key(kind=KIND, scheme=scheme.to_json(), examples=examples)
    place = sweep.place(KIND, key)
    record = recorded(sweep, KIND, key)
    if record is not None:
        return record, place
    from audit.plots import sensitivity_by_site  # matplotlib, which most sweeps load beside

    timer = Stopwatch()
    found = analyse(loaded, treatments, scheme, examples)
    detail = found.to_json()
    metrics = finite(
        {
            "output_error": found.error,
            "sum_of_site_errors": found.sum_of_errors,
            "metric_loss": found.effect.loss,
            "sites": float(len(found.rows)),
            "examples": float(found.examples),
            "seconds": timer.elapsed,
        }
    )
    base = Record(
        KIND,
        key,
        f"sensitivity · {scheme.name}",
        tags={"task": found.task},
        params={"scheme": scheme.name, "metric": found.metric},
        metrics=metrics,
        detail=detail,
        started=timer.started,
    )
    files = {
        TABLE: encode.csv_bytes(detail["sites"]),
        "sensitivity.json": encode.json_bytes(detail),
        "sensitivity.png": sensitivity_by_site(detail),
    }
    return spool.commit(place, base, files), place
