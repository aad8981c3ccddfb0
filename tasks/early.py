"""Evaluating a cell from look to look, until its verdict is certain or all examples are seen."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from evaluators.acceptance import ruled_out
from evaluators.metric import Outcomes
from evaluators.stopping import EXAMPLE, Stop, Watch, looks
from halfstep.examples import Examples
from tasks.evaluated import Evaluated, Progress, described
from tasks.plan import Plan, Task

Resources = dict[str, float]


def watch(plan: Plan, task: Task, resources: Resources, reference: Evaluated) -> Watch | None:
    """Who says when a cell may stop; None where every example has to be seen."""
    if not plan.stops_early(task):
        return None
    assert reference.outcomes is not None
    return Watch(
        task.criteria,
        task.evaluator.metrics,
        reference.outcomes,
        plan.cells,
        task.max_unscored,
        ruled_out(resources, reference.resources, task.criteria),
    )


def run_watched(
    model: nn.Module,
    task: Task,
    examples: Examples,
    batch_size: int,
    progress: Progress,
    reference: Outcomes,
    watching: Watch,
) -> tuple[Outcomes, Stop | None]:
    """Outcomes of the examples that were seen, in the split's order; with their places in it, and
    why no more were needed, where those are not all."""
    found: list[Outcomes] = []
    parts = _parts(examples, reference.clusters, batch_size)
    for number, (part, some) in enumerate(parts, 1):
        outcomes = task.evaluator.run(model, some, batch_size, progress, reference.take(part))
        found.append(described(outcomes, task, some))
        seen = np.concatenate([which for which, _ in parts[:number]])
        order = np.argsort(seen)
        table = Outcomes.joined(found).take(order)
        if number == len(parts):
            break
        table = table.beside({EXAMPLE: seen[order]})
        stop = watching.look(table)
        if stop is not None:
            progress(sum(len(rest.inputs) for _, rest in parts[number:]))
            return table, stop
    return table, None


_PARTS: WeakKeyDictionary[Examples, list[tuple[np.ndarray, Examples]]] = WeakKeyDictionary()
"""The parts of each split, which all cells share."""


def _parts(
    examples: Examples, clusters: np.ndarray | None, batch_size: int
) -> list[tuple[np.ndarray, Examples]]:
    """Which examples come between one look and the next, and those examples."""
    if examples not in _PARTS:
        cut = looks(len(examples), clusters, batch_size)
        _PARTS[examples] = [(part, examples.take(part)) for part in cut]
    return _PARTS[examples]
