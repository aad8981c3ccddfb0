"""What a sweep shows in Prefect: how far it is, and in the end its decision, cells and links."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from audit.note import sweep_note
from audit.store import Store
from flows.progress import Reporter, reporter, reporting
from flows.show import page_of

UPDATED_EVERY = 2.0


class _Progress:
    """Rows that were run, of all, as a progress artifact. Prefect is never the trail: where it does
    not answer, nothing is shown and the sweep goes on."""

    def __init__(self) -> None:
        self._total, self._done, self._shown = 0, 0, 0.0
        self._artifact: Any = None

    def expect(self, examples: int) -> None:
        self._total = examples
        with suppress(Exception):
            self._artifact = create_progress_artifact(
                progress=0.0, key="halfstep-progress", description="Rows run, of all passes"
            )

    def advance(self, examples: int) -> None:
        self._done += examples
        if time.monotonic() - self._shown > UPDATED_EVERY:
            self._show(min(100.0, 100.0 * self._done / max(self._total, 1)))

    def end(self) -> None:
        self._show(100.0)

    def _show(self, percent: float) -> None:
        self._shown = time.monotonic()
        if self._artifact is not None:
            with suppress(Exception):
                update_progress_artifact(self._artifact, progress=percent)


@contextmanager
def watched() -> Iterator[None]:
    """Progress and steps go to Prefect too."""
    outer, shown, logger = reporter(), _Progress(), get_run_logger()

    def both(one: Callable[..., None], other: Callable[..., None]) -> Callable[..., None]:
        def act(value: Any) -> None:
            one(value)
            other(value)

        return act

    to = Reporter(
        expect=both(outer.expect, shown.expect),
        advance=both(outer.advance, shown.advance),
        say=both(outer.say, logger.info),
        warn=both(outer.warn, logger.warning),
    )
    with reporting(to):
        yield
    shown.end()


def leave_artifacts(result: Mapping[str, Any], store: Store) -> None:
    """The decision, a table of the cells, and a link to the run in MLflow."""
    headlines = {task["name"]: task["headline"] for task in result["tasks"]}
    create_markdown_artifact(sweep_note(result), key="halfstep-decision")
    create_table_artifact(
        [
            {
                "cell": c["name"],
                "task": c["task"],
                "verdict": c["verdict"],
                "weight bytes": c["weight_bytes"],
            }
            | {k: round(c["metrics"][k], 4) for k in (headlines[c["task"]],) if k in c["metrics"]}
            for c in result["cells"]
        ],
        key="halfstep-cells",
    )
    create_link_artifact(
        page_of(result, store), key="halfstep-mlflow", link_text="the sweep in MLflow",
        description=None if not store.embedded else f"after: halfstep ui --store {store.path}",
    )  # fmt: skip
