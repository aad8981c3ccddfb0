"""The steps of a sweep as one value, so that the flow is written once for both ways of running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halfstep.scheme import Scheme
from tasks.calibrate import Calibrated, run_calibration
from tasks.cell import run_cell
from tasks.decide import Decision, Judgements, conclude, select
from tasks.evaluated import Evaluated
from tasks.load import Loaded, load
from tasks.reference import measure_reference


@dataclass(frozen=True)
class Steps:
    """What a flow calls. `PLAIN` holds the functions; `tasks.orchestrated` wraps each as a task."""

    load: Callable[..., Loaded]
    reference: Callable[..., Evaluated]
    calibrate: Callable[..., Calibrated]
    cell: Callable[..., Evaluated]
    select: Callable[..., tuple[Judgements, Scheme | None]]
    conclude: Callable[..., Decision]
    record: Callable[..., Any]


def _record(closing: Callable[..., Any], *arguments: Any) -> Any:
    return closing(*arguments)


PLAIN = Steps(load, measure_reference, run_calibration, run_cell, select, conclude, _record)
