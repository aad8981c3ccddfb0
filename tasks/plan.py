"""The plan: frozen, typed values that a config was parsed into. No dictionaries below this."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from evaluators.acceptance import Criterion
from halfstep.scheme import Override, Scheme
from sources import DATASETS, SUBJECTS, DataSource, SubjectSource

SPLITS = ("calibration", "selection", "confirmation")


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
class Task:
    """What the subject is evaluated on, how, and what is good enough."""

    name: str
    evaluator: str
    data: DataSource
    calibration: SplitSpec
    selection: SplitSpec
    confirmation: SplitSpec
    criteria: tuple[Criterion, ...]

    def splits(self) -> dict[str, SplitSpec]:
        return {name: getattr(self, name) for name in SPLITS}


@dataclass(frozen=True)
class Compute:
    """How forward passes run. Part of the protocol: both can move the last bit of a result."""

    threads: int = 1
    batch_size: int = 64


@dataclass(frozen=True)
class Plan:
    """One sweep."""

    name: str
    subject: SubjectSource
    task: Task
    schemes: tuple[Scheme, ...]
    folded_duplicates: int
    """Cells of the matrix that were the same scheme under another spelling."""
    skip: tuple[str, ...]
    """Patterns of sites at full precision; every scheme's last override says the same."""
    overrides: tuple[Override, ...]
    """What every scheme does otherwise at some sites."""
    objective: str
    compute: Compute

    def to_json(self) -> dict[str, object]:
        """The resolved config: every default written out."""
        subject = next(k for k, v in SUBJECTS.items() if isinstance(self.subject, v))
        data = next(k for k, v in DATASETS.items() if isinstance(self.task.data, v))
        return {
            "name": self.name,
            "subject": {"source": subject, **asdict(self.subject)},
            "tasks": [
                {
                    "name": self.task.name,
                    "evaluator": self.task.evaluator,
                    "data": {"source": data, **asdict(self.task.data)},
                    "splits": {n: s.to_json() for n, s in self.task.splits().items()},
                    "criteria": [c.to_json() for c in self.task.criteria],
                }
            ],
            "cells": [scheme.to_json() for scheme in self.schemes],
            "sites": {
                "skip": list(self.skip),
                "overrides": [override.to_json() for override in self.overrides],
            },
            "objective": self.objective,
            "compute": asdict(self.compute),
        }
