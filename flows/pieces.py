"""Serving a depot's queue as a Prefect flow on a work pool: ``flows.pieces.pieces``."""

from __future__ import annotations

from prefect import flow, get_run_logger

from flows.progress import Reporter, reporting
from flows.work import IDLE, serve


@flow(name="halfstep work", flow_run_name="work", persist_result=False, validate_parameters=False)
def pieces(depot: str, idle: float = IDLE) -> int:
    """Takes pieces from a depot until there has been none for ``idle`` seconds; how many."""
    with reporting(Reporter(say=get_run_logger().info)):
        return serve(depot, idle)
