"""Evaluations as the trail holds them: outcomes, the protocol they were made under, the subject."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from audit import encode, lookup
from audit.evidence import PARENT, PREFIX
from audit.store import Store
from audit.trail import connect, stored
from halfstep.errors import UserError

EVALUATED = ("cell", "confirmation", "reference")


class Recorded:
    """A recorded sweep: its result and its artifacts."""

    def __init__(self, store: Store, wanted: str) -> None:
        self._client: MlflowClient = connect(store)
        self.run_id = lookup.sweep_run(store, wanted)
        self.result: Mapping[str, Any] = lookup.find(store, self.run_id)

    def artifact(self, path: str, run_id: str | None = None) -> bytes:
        """A file of the sweep's run, or of one below it.

        Raises:
            UserError: it is not there.
        """
        run_id = run_id or self.run_id
        try:
            return stored(self._client, run_id, path)
        except (MlflowException, OSError) as error:
            raise UserError(f"run {run_id} has lost its artifact {path}") from error

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """By task: what must be equal before results may be compared."""
        whole = json.loads(self.artifact("config/protocol.json"))
        return {found["task"]: found for found in whole.get("tasks", [whole])}

    @cached_property
    def subject(self) -> dict[str, Any]:
        return json.loads(self.artifact("subject.json"))  # type: ignore[no-any-return]

    @cached_property
    def environment(self) -> dict[str, Any]:
        return json.loads(self.artifact("environment.json"))  # type: ignore[no-any-return]

    def evaluation(self, run_id: str) -> Evaluation:
        """One run below this sweep.

        Raises:
            UserError: it holds no outcomes.
        """
        run = self._client.get_run(run_id)
        tags = run.data.tags
        kind = tags.get(PREFIX + "kind")
        if kind not in EVALUATED or tags.get(PARENT) != self.run_id:
            raise UserError(f"run {run_id} ({kind}) holds no outcomes to compare")
        return Evaluation(self, run)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A cell, a confirmation or a reference."""

    sweep: Recorded
    run: Run

    @property
    def name(self) -> str:
        return str(self.run.info.run_name)

    @property
    def task(self) -> str:
        return str(self.run.data.tags[PREFIX + "task"])

    @property
    def split(self) -> str:
        return str(self.run.data.tags[PREFIX + "split"])

    @property
    def protocol(self) -> dict[str, Any]:
        """That of its task, with the split it was evaluated on."""
        return self.sweep.protocols[self.task] | {"evaluated on": self.split}

    def columns(self) -> dict[str, np.ndarray]:
        """Its outcomes, one row an example."""
        return self._columns(self.run.info.run_id)

    def reference_columns(self) -> dict[str, np.ndarray]:
        """Those of full precision on the same split."""
        task = next(t for t in self.sweep.result["tasks"] if t["name"] == self.task)
        return self._columns(task["reference"][self.split]["run_id"])

    def _columns(self, run_id: str) -> dict[str, np.ndarray]:
        name = f"outcomes-{self.split}.parquet"
        return encode.read_parquet(self.sweep.artifact(name, run_id))


def protocol_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Every field in which two protocols differ, with both values."""
    one, two = dict(_flat(first)), dict(_flat(second))
    return [
        f"{field}: {_shown(one, field)} and {_shown(two, field)}"
        for field in dict.fromkeys([*one, *two])
        if one.get(field, _flat) != two.get(field, _flat)
    ]


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{where}[{i}]")
    else:
        yield where, value


def _shown(found: Mapping[str, Any], field: str) -> str:
    if field not in found:
        return "nothing"
    text = str(found[field])
    return text if len(text) <= 20 else f"{text[:16]}…"
