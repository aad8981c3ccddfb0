"""Runs of a Prefect deployment that serve a depot's queue, looked after while pieces wait."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import UUID

from flows.progress import reporter
from halfstep.errors import UserError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

DEPLOYMENT = "halfstep work/workers"
"""What serves the queue on Prefect's workers; `prefect.yaml` deploys it."""
LOOKED_AFTER = 10.0
"""Seconds between two looks at the runs."""
REPLACED = 3
"""How often each run may be replaced without a piece being done in between."""


class Served:
    """So many runs. One that ends while pieces wait, killed, failed or idle for too long, is
    replaced; one that somebody cancels is not."""

    def __init__(self, depot: str, count: int) -> None:
        """
        Raises:
            UserError: the server has no such deployment.
        """
        self._depot = depot
        self._count = count
        self._replaced = 0
        self._looked = time.monotonic()
        self._runs = [self._start() for _ in range(count)]

    def _start(self) -> UUID:
        """The id of a new run."""
        from prefect.deployments import run_deployment
        from prefect.exceptions import ObjectNotFound

        try:
            run = run_deployment(DEPLOYMENT, parameters={"depot": self._depot}, timeout=0)
        except ObjectNotFound as error:
            raise UserError(
                f"--runner prefect: the Prefect server has no deployment {DEPLOYMENT!r}; deploy it "
                "to a work pool with: prefect deploy --name workers"
            ) from error
        return run.id  # type: ignore[union-attr, no-any-return]

    def progressed(self) -> None:
        """A piece is done."""
        self._replaced = 0

    def attend(self) -> None:
        """Replaces runs that ended, at most every `LOOKED_AFTER` seconds.

        Raises:
            UserError: they end again and again, or all were cancelled.
        """
        from httpx import HTTPError

        if time.monotonic() - self._looked < LOOKED_AFTER:
            return
        with suppress(HTTPError):  # without Prefect's server the queue goes on
            self._replace()
        self._looked = time.monotonic()

    def _replace(self) -> None:
        for run, state in self._ended():
            said = f"{state.name}: {state.message.splitlines()[0]}" if state.message else state.name
            if state.is_cancelled():
                self._runs.remove(run)
                continue
            if self._replaced >= REPLACED * self._count:
                raise UserError(
                    f"--runner prefect: runs of {DEPLOYMENT!r} end before a piece is done, the "
                    f"last {said}. What was finished is kept; run the same command to go on"
                )
            self._runs[self._runs.index(run)] = self._start()
            self._replaced += 1
            reporter().say(f"a run that served the queue has ended ({said}); another is started")
        if not self._runs:
            raise UserError(
                "--runner prefect: every run that served this sweep was cancelled. What was "
                "finished is kept; run the same command to go on"
            )

    def _ended(self) -> list[tuple[UUID, State]]:
        """Runs that ended, with their last state; one that was deleted counts as cancelled."""
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound
        from prefect.states import Cancelled

        found: list[tuple[UUID, State]] = []
        with get_client(sync_client=True) as client:
            for run in self._runs:
                try:
                    state = client.read_flow_run(run).state
                except ObjectNotFound:
                    state = Cancelled()
                if state is not None and state.is_final():
                    found.append((run, state))
        return found
