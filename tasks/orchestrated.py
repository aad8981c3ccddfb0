"""The same steps as Prefect tasks: names for people, no caching and no stored results.

Prefect's caches key on source and inputs and would reuse stale work when a helper changes; our
records are keyed by the digests of everything that matters (`tasks.load.Loaded.key`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from tasks.steps import PLAIN, Steps
from tasks.work import perform


def _wrapped(
    name: str, function: Callable[..., Any], label: Callable[[dict[str, Any]], str]
) -> Any:
    return task(
        name=name,
        task_run_name=lambda: label(task_run.parameters),
        cache_policy=NO_CACHE,
        persist_result=False,
        log_prints=False,
    )(function)


PIECE = _wrapped("piece", perform, lambda p: p["work"].name)
"""What a task runner hands to its workers."""
TASKS = Steps(
    load=_wrapped("load", PLAIN.load, lambda p: "load"),
    reference=_wrapped(
        "reference", PLAIN.reference, lambda p: f"reference · {p['task']} · {p['split']}"
    ),
    calibrate=_wrapped("calibrate", PLAIN.calibrate, lambda p: "calibrate"),
    cell=_wrapped("cell", PLAIN.cell, lambda p: f"{p['scheme'].name} · {p['task']} · {p['split']}"),
    mix=_wrapped("mixed precision", PLAIN.mix, lambda p: "mixed precision"),
    probe=_wrapped("sensitivity", PLAIN.probe, lambda p: f"sensitivity · {p['scheme'].name}"),
    deploy=_wrapped("deployment", PLAIN.deploy, lambda p: "deployment"),
    select=_wrapped("select", PLAIN.select, lambda p: "select"),
    conclude=_wrapped("decide", PLAIN.conclude, lambda p: "decide"),
    variant=_wrapped("variant", PLAIN.variant, lambda p: f"variant · {p['scheme'].name}"),
    record=_wrapped("record", PLAIN.record, lambda p: "record"),
)
