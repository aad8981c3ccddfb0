"""One look at the registry as a Prefect flow, for a work pool: ``flows.version_watch.watch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.launch import Launch
from flows.runners import LOCAL, Runner
from flows.watch import Watcher


@flow(
    name="halfstep watch",
    flow_run_name="watch {config}",
    persist_result=False,
    validate_parameters=False,
)
def watch(
    config: str,
    store: str = "mlruns",
    since: int | None = None,
    author: str = "",
    key: str | None = None,
    runner: str = LOCAL,
    address: str = "",
    workers: int = 2,
    depot: str = "",
) -> list[dict[str, Any]]:
    """Sweeps what is new; the events."""
    started = Launch(
        Path(config), Path(store), False, author, Path(key) if key else None,
        Runner(runner, address, workers, depot),
    )  # fmt: skip
    told: list[dict[str, Any]] = []
    logger = get_run_logger()

    def tell(event: Any) -> None:
        told.append(dict(event))
        logger.info("%s version %s: %s", event["model"], event.get("version"), event["event"])

    Watcher(started, since=since, told=tell).run(0.0, once=True)
    return told
