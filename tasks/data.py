"""The data of a sweep: pools, splits, and what calibrates; checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from halfstep.errors import UserError, allowed
from halfstep.examples import Column, Examples, Inputs
from sources import Context, Pools
from tasks.plan import Plan, SplitSpec, Task


@dataclass(frozen=True, eq=False)
class TaskData:
    """The splits of one task."""

    task: Task
    splits: Mapping[str, Examples]


@dataclass(frozen=True, eq=False)
class Data:
    """The splits of all tasks, and the rows that calibrate for all of them."""

    tasks: Mapping[str, TaskData]
    pools: Pools
    """Of the first task: what subjects that are trained here train on."""
    calibration: Inputs
    notes: tuple[str, ...]


def read_data(plan: Plan, context: Context) -> Data:
    """Reads every task's data once, and takes the splits.

    Raises:
        UserError: names what is wrong with which pool, split or column.
    """
    read: list[tuple[object, Pools]] = []
    tasks: dict[str, TaskData] = {}
    notes: list[str] = []
    for task in plan.tasks:
        pools = next((pools for source, pools in read if source == task.data), None)
        if pools is None:
            pools = task.data.load(context)
            read.append((task.data, pools))
        where = "" if len(plan.tasks) == 1 else f"tasks.{task.name}: "
        try:
            splits = {name: take(name, spec, pools) for name, spec in task.splits().items()}
            _check(task, splits)
        except UserError as error:
            raise UserError(f"{where}{error}") from error
        tasks[task.name] = TaskData(task, splits)
        notes += [f"{where}{note}" for note in _told(pools)]
        notes += [f"{where}{note}" for note in _unusable(task, pools)]
    _check_calibration(tasks)
    return Data(tasks, read[0][1], _calibration(tasks), tuple(dict.fromkeys(notes)))


def take(name: str, spec: SplitSpec, pools: Pools) -> Examples:
    """The examples of one split."""
    if spec.pool not in pools:
        raise UserError(f"splits.{name}.from: no pool {spec.pool!r}; {allowed(spec.pool, pools)}")
    pool = pools[spec.pool]
    if spec.targets is not None:
        if pool.targets.shape != ():
            raise UserError(f"splits.{name}.targets: the targets of this data are no class numbers")
        wanted = np.isin(pool.targets.all().numpy(), spec.targets)
        if not wanted.any():
            raise UserError(
                f"splits.{name}.targets: no example of pool {spec.pool!r} has one of "
                f"{list(spec.targets)}"
            )
        pool = pool.take(np.flatnonzero(wanted))
    if len(pool) == 0:
        raise UserError(f"splits.{name}: pool {spec.pool!r} holds no examples")
    if spec.samples is None:
        return pool
    if spec.samples > len(pool):
        raise UserError(
            f"splits.{name}.samples: {spec.samples} asked for, but pool {spec.pool!r} holds "
            f"{len(pool)}" + (" with these targets" if spec.targets is not None else "")
        )
    generator = torch.Generator().manual_seed(spec.seed)
    chosen = torch.randperm(len(pool), generator=generator)[: spec.samples]
    return pool.take(chosen.sort().values)


def _check(task: Task, splits: Mapping[str, Examples]) -> None:
    for name in ("selection", "confirmation"):
        examples = splits[name]
        task.evaluator.check(f"split {name!r}", examples)
        for column in dict.fromkeys([*task.slices, *filter(None, [task.cluster])]):
            if column not in examples.columns:
                raise UserError(
                    f"the data has no column {column!r} to slice or cluster by; "
                    f"{allowed(column, examples.columns) if examples.columns else 'it has none'}"
                )
        _check_slices(task, name, examples)
    for one, other in combinations(splits, 2):
        check_disjoint(one, splits[one], other, splits[other])


def _check_slices(task: Task, split: str, examples: Examples) -> None:
    for criterion in task.criteria:
        if criterion.slice is None:
            continue
        sizes = np.unique(examples.columns[criterion.slice].astype(str), return_counts=True)[1]
        if sizes.max() < criterion.min_examples:
            raise UserError(
                f"criterion {criterion.label}: no slice of split {split!r} holds min_examples "
                f"{criterion.min_examples}; the largest holds {sizes.max()}"
            )


def check_disjoint(one: str, ours: Examples, other: str, theirs: Examples) -> None:
    """Raises UserError where two splits share an example, found by content, not by index."""
    shared = np.isin(theirs.digests, ours.digests)
    if shared.any():
        raise UserError(
            f"splits {one!r} and {other!r} share {shared.sum()} example(s) with equal content (the "
            f"first is row {int(np.argmax(shared))} of {other!r}); a verdict needs disjoint "
            "splits: take them from different pools"
        )


def _check_calibration(tasks: Mapping[str, TaskData]) -> None:
    """No task's calibration may hold what another one is judged on."""
    for one, other in combinations(tasks.values(), 2):
        for ours, theirs in ((one, other), (other, one)):
            calibration = ours.splits.get("calibration")
            for name in ("selection", "confirmation"):
                if calibration is not None:
                    check_disjoint(
                        f"{ours.task.name} calibration", calibration,
                        f"{theirs.task.name} {name}", theirs.splits[name],
                    )  # fmt: skip


def _told(pools: Pools) -> Iterator[str]:
    """What happened while examples were made, a sentence each."""
    for what in dict.fromkeys(what for pool in pools.values() for what in pool.told):
        counts = [f"{p.told[what]:,} in {name}" for name, p in pools.items() if what in p.told]
        yield f"{what}: {', '.join(counts)}"


def _unusable(task: Task, pools: Pools) -> Iterator[str]:
    """What could not be read, where that is within the limit."""
    for name, pool in pools.items():
        if not pool.unusable:
            continue
        total = len(pool) + len(pool.unusable)
        share = len(pool.unusable) / total
        if share > task.max_unscored:
            raise UserError(
                f"pool {name!r}: {len(pool.unusable)} of {total} rows cannot be scored (the first: "
                f"{pool.unusable[0]}); mend them, or allow a share with max_unscored: {share:.3f}"
            )
        yield f"{len(pool.unusable)} of {total} rows of pool {name!r} could not be used"


def _calibration(tasks: Mapping[str, TaskData]) -> Inputs:
    """The rows of all calibration splits, each once. What all examples of a task share is not
    among them: documents that shall calibrate are examples of a pool of their own."""
    parts = []
    for data in tasks.values():
        split = data.splits.get("calibration")
        if split is not None:
            own = split.inputs
            if split.members is not None:
                own = own.take(np.unique(split.members))
            parts.append(own)
    if not parts:
        raise UserError("no task has a calibration split; give one of them splits.calibration")
    return parts[0] if len(parts) == 1 else joined(parts)


def joined(parts: list[Inputs]) -> Inputs:
    """Rows of several inputs as one, in memory, each distinct row once."""
    names = list(parts[0].columns)
    for part in parts[1:]:
        if sorted(part.columns) != sorted(names):
            raise UserError(
                f"the tasks' calibration data differ in what the model takes: "
                f"{parts[0].described()} and {part.described()}"
            )
    first: dict[bytes, tuple[int, int]] = {}
    for p, part in enumerate(parts):
        for i, digest in enumerate(part.digests.tolist()):
            first.setdefault(digest, (p, i))
    columns = {}
    for name in names:
        rows = [parts[p].columns[name].row(i) for p, i in first.values()]
        alike = len({row.shape for row in rows}) == 1
        if not alike and any(row.dim() == 0 for row in rows):
            raise UserError(
                f"the tasks' calibration data differ in the shape of {name or 'inputs'}"
            )
        columns[name] = Column.of(torch.stack(rows)) if alike else Column.ragged(rows)
    return Inputs(columns)
