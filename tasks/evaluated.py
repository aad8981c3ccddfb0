"""What an evaluation leaves, and finding one that is recorded already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from evaluators.metric import CLUSTER, SLICE, Outcomes
from evaluators.stopping import Stop
from halfstep.examples import Examples
from halfstep.interval import Interval
from tasks.plan import Task

Progress = Callable[[int], None]
"""Told how many examples each batch adds."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A cell or the reference on one split, and the record that was committed for it."""

    record: Record
    folder: Path
    outcomes: Outcomes | None
    """None where the cell failed."""
    resources: Mapping[str, float]
    reused: bool
    seconds: float = 0.0
    """Of useful work: forward passes and what they need, without the writing of the record."""
    measured: Mapping[str, Interval] = field(default_factory=dict)
    """What was measured of a cell that a backend runs, or of the reference beside such cells."""

    @property
    def stopped(self) -> Stop | None:
        """Where the verdict was certain before all examples were seen."""
        found = self.record.detail.get("stopped")
        return Stop.from_json(found) if found else None


def recorded(sweep: SweepFolder, kind: str, key: str) -> Record | None:
    """Work that is recorded already: in this sweep, or in an earlier one with equal digests."""
    folder, earlier = sweep.place(kind, key), sweep.earlier(kind, key)
    record = spool.recall(folder)
    if record is None and earlier is not None:
        record = spool.copy(earlier, folder)
    return record if record is not None and record.key == key else None


def reuse(sweep: SweepFolder, kind: str, key: str) -> Evaluated | None:
    """A recorded evaluation with its outcomes, or None where there is none."""
    folder, record = sweep.place(kind, key), recorded(sweep, kind, key)
    if record is None:
        return None
    outcomes = None
    if record.status == "finished":
        data = (folder / spool.FILES / f"outcomes-{record.tags['split']}.parquet").read_bytes()
        outcomes = Outcomes(encode.read_parquet(data))
    return Evaluated(record, folder, outcomes, record.detail["resources"], reused=True)


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Only what is a number: a metric that could not be computed is absent, not infinite."""
    return {k: float(v) for k, v in values.items() if np.isfinite(v)}


def described(outcomes: Outcomes, task: Task, examples: Examples) -> Outcomes:
    """With the columns that clusters and slices go by, so that the record can be judged alone."""
    columns: dict[str, np.ndarray] = {
        SLICE + name: _texts(examples.columns[name]) for name in task.slices
    }
    if task.cluster is not None:
        columns[CLUSTER] = _texts(examples.columns[task.cluster])
    return outcomes.beside(columns)


def _texts(values: np.ndarray) -> np.ndarray:
    """As texts no wider than they need to be: what a file gives back."""
    return np.array([str(value) for value in values.tolist()])
