"""Whether a Prefect server is configured, and whether it answers."""

from __future__ import annotations

import os
from pathlib import Path

from halfstep.errors import UserError

QUIET = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


def configured_api() -> str | None:
    """The API address from ``PREFECT_API_URL`` or the active Prefect profile, else None.

    Prefect is imported only where a profile might name a server: without one a sweep runs the same
    functions by itself, and starts nothing.

    Raises:
        UserError: an address is configured and nothing answers there.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    if "PREFECT_API_URL" not in os.environ and not (home / "profiles.toml").exists():
        return None
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    if address:
        _check(address)
    return address or None


def _check(address: str) -> None:
    import httpx

    try:
        httpx.get(f"{address.rstrip('/')}/health", timeout=5).raise_for_status()
    except httpx.HTTPError as error:
        raise UserError(
            f"PREFECT_API_URL is {address}, but no Prefect server answers there ({error}); start "
            "it, or unset PREFECT_API_URL to run without one"
        ) from error
