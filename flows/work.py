"""Serving a depot's queue.

See `flows.pieces` for Prefect.
"""

from __future__ import annotations

from flows.progress import reporter
from tasks.depot import Depot
from tasks.queue import Worker

IDLE = 300.0


def serve(depot: str, idle: float) -> int:
    """Takes pieces until there has been none for ``idle`` seconds (0: for ever); how many.

    Raises:
        UserError: the depot cannot be used, or this machine computes otherwise.
    """
    held = Depot(depot, reporter().say)
    held.check()
    worker = Worker(held)
    reporter().say(f"worker {worker.name} takes work from {held.shown}")
    return worker.serve(idle or None, reporter().say)
