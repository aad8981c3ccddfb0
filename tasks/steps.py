"""The steps of a sweep as one value, so that the flow is written once for both ways of running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.spool import Record
from halfstep.scheme import Scheme
from tasks.calibrate import Calibrated, run_calibration
from tasks.cell import run_cell
from tasks.decide import Decision, Judgements, conclude, select
from tasks.deployment import run_deployment
from tasks.evaluated import Evaluated
from tasks.load import Loaded, load
from tasks.mixed import run_mixed
from tasks.reference import measure_reference
from tasks.sensitivity import run_sensitivity
from tasks.variant import make_variant


@dataclass(frozen=True)
class Steps:
    """What a flow calls. `PLAIN` holds the functions; `tasks.orchestrated` wraps each as a task."""

    load: Callable[..., Loaded]
    reference: Callable[..., Evaluated]
    calibrate: Callable[..., Calibrated]
    mix: Callable[..., tuple[list[Scheme], Record, Path]]
    cell: Callable[..., Evaluated]
    probe: Callable[..., tuple[Record, Path]]
    deploy: Callable[..., tuple[Record, Path]]
    select: Callable[..., tuple[Judgements, Scheme | None]]
    conclude: Callable[..., Decision]
    variant: Callable[..., tuple[Record, Path]]
    record: Callable[..., Any]


def _record(closing: Callable[..., Any], *arguments: Any) -> Any:
    return closing(*arguments)


PLAIN = Steps(
    load,
    measure_reference,
    run_calibration,
    run_mixed,
    run_cell,
    run_sensitivity,
    run_deployment,
    select,
    conclude,
    make_variant,
    _record,
)
