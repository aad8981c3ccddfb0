"""The plan: frozen, typed values that a config was parsed into. No dictionaries below this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from backends.cost import Prices
from evaluators.criterion import COUNTED, Criterion
from evaluators.evaluator import Evaluator
from halfstep.corrections import Correction
from halfstep.scheme import Override, Scheme, Spec
from sources import DataSource, SubjectSource

SPLITS = ("calibration", "selection", "confirmation")
EVALUATIONS = ("full", "early")
"""Whether every cell sees all of the selection split, or stops once its verdict is certain."""


@dataclass(frozen=True)
class SplitSpec:
    """Which examples of a pool make up a split: all of it, or a seeded sample."""

    pool: str
    samples: int | None
    seed: int
    targets: tuple[int, ...] | None = None
    """Only examples with one of these targets; None for all."""

    def to_json(self) -> dict[str, object]:
        record: dict[str, object] = {"from": self.pool, "samples": self.samples, "seed": self.seed}
        return record | ({"targets": list(self.targets)} if self.targets is not None else {})


@dataclass(frozen=True)
class Named:
    """A value that a config chose by name, and the name."""

    name: str
    value: Any

    def to_json(self, key: str) -> dict[str, object]:
        settings = {k: v for k, v in asdict(self.value).items() if v is not None}
        return {key: self.name, **settings}


@dataclass(frozen=True)
class Task:
    """What the subject is evaluated on, how, and what is good enough."""

    name: str
    evaluated_by: Named
    """An `Evaluator`."""
    taken_from: Named
    """A `DataSource`."""
    calibration: SplitSpec | None
    """None where the other tasks' examples calibrate."""
    selection: SplitSpec
    confirmation: SplitSpec
    criteria: tuple[Criterion, ...]
    cluster: str | None = None
    """The column that says which examples come in one group."""
    max_unscored: float = 0.0
    """The share of examples that may be unusable, or unscored, before that is an error."""

    @property
    def evaluator(self) -> Evaluator:
        return self.evaluated_by.value  # type: ignore[no-any-return]

    @property
    def data(self) -> DataSource:
        return self.taken_from.value  # type: ignore[no-any-return]

    @property
    def slices(self) -> tuple[str, ...]:
        """Columns that criteria slice by."""
        return tuple(dict.fromkeys(c.slice for c in self.criteria if c.slice is not None))

    def splits(self) -> dict[str, SplitSpec]:
        """Those that the task has, by name."""
        return {name: s for name in SPLITS if (s := getattr(self, name)) is not None}

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "evaluator": self.evaluated_by.to_json("name"),
            "data": self.taken_from.to_json("source"),
            "splits": {n: s.to_json() for n, s in self.splits().items()},
            "criteria": [c.to_json() for c in self.criteria],
            "cluster": self.cluster,
            "max_unscored": self.max_unscored,
        }


@dataclass(frozen=True)
class Compute:
    """How forward passes run. Part of the protocol: both can move the last bit of a result."""

    threads: int = 1
    batch_size: int = 64


@dataclass(frozen=True)
class Deployment:
    """What deployed cells are measured for, and how."""

    target: str = "here"
    """A name of `backends.hardware.TARGETS`, or ``here``."""
    queries: int = 700
    """Single queries of each candidate; other batch sizes get a share of them."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    threads: int = 1
    cpus: tuple[int, ...] | None = None
    """Processors that the measuring thread is bound to; None for those it is allowed."""
    latency_ms: float | None = None
    """The latency objective that costs are told at."""
    prices: Prices | None = None

    def to_json(self) -> dict[str, object]:
        record = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in record.items()}


@dataclass(frozen=True)
class Budget:
    """What a mixed scheme may cost: a resource, as a share of the reference's, or a loss of the
    first task's metric."""

    name: str
    limit: float

    @property
    def of_resource(self) -> bool:
        return self.name in COUNTED

    @property
    def label(self) -> str:
        return f"mixed {self.name} {self.limit:g}"


@dataclass(frozen=True)
class Mixed:
    """The choices from which mixed-precision schemes are put together, one scheme a budget."""

    weights: tuple[Spec | None, ...]
    activations: tuple[Spec | None, ...]
    corrections: tuple[Correction, ...]
    budgets: tuple[Budget, ...]
    examples: int
    """Calibration examples that choices are measured on."""
    overrides: tuple[Override, ...] = ()

    @property
    def uniform(self) -> tuple[Scheme, ...]:
        """Each choice of a weight with the first of the activations, then the other activations
        with the first weight: together they hold every choice."""
        pairs = [(w, self.activations[0]) for w in self.weights]
        pairs += [(self.weights[0], a) for a in self.activations[1:]]
        return tuple(
            Scheme(w, a, self.corrections if w else (), self.overrides)
            for w, a in pairs
            if w is not None or a is not None
        )

    def to_json(self) -> dict[str, object]:
        def named(specs: tuple[Spec | None, ...]) -> list[object]:
            return [spec.to_json() if spec else {"format": "none"} for spec in specs]

        return {
            "weights": named(self.weights),
            "activations": named(self.activations),
            "corrections": [correction.to_json() for correction in self.corrections],
            "budgets": [{budget.name: budget.limit} for budget in self.budgets],
            "examples": self.examples,
        }


@dataclass(frozen=True)
class Plan:
    """One sweep."""

    name: str
    taken_from: Named
    """A `SubjectSource`."""
    tasks: tuple[Task, ...]
    schemes: tuple[Scheme, ...]
    folded_duplicates: int
    """Cells of the matrix that were the same scheme under another spelling."""
    skip: tuple[str, ...]
    """Patterns of sites at full precision; every scheme's last override says the same."""
    overrides: tuple[Override, ...]
    """What every scheme does otherwise at some sites."""
    objective: str
    compute: Compute
    evaluation: str = "full"
    """One of `EVALUATIONS`."""
    mixed: Mixed | None = None
    """Schemes to be found; None for none."""
    sensitivity: int | None = None
    """Examples on which the chosen scheme is analysed site by site; None where it is not."""
    expires_after_days: int = 365
    """How long a decision holds without another look."""
    plugins: tuple[str, ...] = ()
    """Other packages whose code takes part, each with its version and the digest of its code."""
    deployment: Deployment | None = None
    """None where no cell names a backend."""

    @property
    def deploys(self) -> bool:
        """True where a backend runs some of the schemes."""
        return any(scheme.deployed for scheme in self.schemes)

    @property
    def subject(self) -> SubjectSource:
        return self.taken_from.value  # type: ignore[no-any-return]

    @property
    def cells(self) -> int:
        """How many cells there are to judge."""
        found = len(self.mixed.budgets) if self.mixed else 0
        return (len(self.schemes) + found) * len(self.tasks)

    @property
    def treated(self) -> tuple[Scheme, ...]:
        """The matrix, and what mixed schemes are put together from: all that has to be calibrated
        for."""
        return self.schemes + (self.mixed.uniform if self.mixed else ())

    def stops_early(self, task: Task) -> bool:
        """True where cells need not see all of a task's selection split."""
        full = any(criterion.preset for criterion in task.criteria)
        return self.evaluation == "early" and task.evaluator.separable and not full

    def label(self, cell: str, task: str) -> str:
        """What a cell is called: after its scheme, and its task where there are several."""
        return cell if len(self.tasks) == 1 else f"{cell} · {task}"

    def key(self, name: str, task: str) -> str:
        """The same for names of params, metrics and tags, which hold fewer signs."""
        return name if len(self.tasks) == 1 else f"{task}.{name}"

    def to_json(self) -> dict[str, object]:
        """The resolved config: every default written out."""
        return {
            "name": self.name,
            "subject": self.taken_from.to_json("source"),
            "tasks": [task.to_json() for task in self.tasks],
            "cells": [scheme.to_json() for scheme in self.schemes],
            "sites": {
                "skip": list(self.skip),
                "overrides": [override.to_json() for override in self.overrides],
            },
            "objective": self.objective,
            "compute": asdict(self.compute),
            "evaluation": self.evaluation,
            "mixed_precision": self.mixed.to_json() if self.mixed else None,
            "sensitivity": {"examples": self.sensitivity} if self.sensitivity else None,
            "deployment": self.deployment.to_json() if self.deployment else None,
            "decision": {"expires_after_days": self.expires_after_days},
            "plugins": list(self.plugins),
        }
