"""Starting a sweep: through Prefect where a server is configured or a runner needs one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.issuer import issuer
from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan
from flows.progress import reporter
from flows.runners import Runner
from flows.server import configured_api, temporary_server
from halfstep.errors import UserError

HERE = Runner()


@dataclass(frozen=True)
class Launch:
    """What a sweep is started with."""

    config: Path
    store: Path
    fresh: bool = False
    author: str = ""
    key: Path | None = None
    runner: Runner = HERE


def launch(wanted: Launch) -> dict[str, Any]:
    """Runs the sweep; its result (see `flows.result`).

    Raises:
        UserError: config, model, data, store or addresses are at fault.
    """
    wanted.runner.check()
    plan = read_plan(wanted.config)
    if configured_api():
        return _flow(wanted)
    if wanted.runner.needs_prefect:
        if wanted.runner.address or wanted.runner.kind == "prefect":
            raise UserError(
                f"--runner {wanted.runner.kind}: workers elsewhere report to a Prefect server, and "
                "none is configured; set PREFECT_API_URL"
            )
        reporter().say("starting a Prefect server for this sweep")
        with temporary_server():
            return _flow(wanted)
    store = Store(wanted.store)
    by = issuer(wanted.author, wanted.key)
    text = wanted.config.read_text(encoding="utf-8")
    with wanted.runner.crew(store) as crew:
        return conduct(plan, text, store, fresh=wanted.fresh, crew=crew, issuer=by)


def _flow(wanted: Launch) -> dict[str, Any]:
    from flows.sweep import run_flow

    key = str(wanted.key) if wanted.key else None
    return run_flow(
        str(wanted.config), str(wanted.store), wanted.fresh, wanted.author, key, wanted.runner
    )
