"""Whether a Prefect server is configured, and whether it answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfstep.errors import UserError, first_line

STARTUP_SECONDS = 120
ANSWER_SECONDS = 10
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


@contextmanager
def temporary_server() -> Iterator[None]:
    """A Prefect server of this process's own, for as long as this is open."""
    from prefect.settings import (
        PREFECT_SERVER_EPHEMERAL_ENABLED,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        temporary_settings,
    )

    with temporary_settings(
        {
            PREFECT_SERVER_EPHEMERAL_ENABLED: True,
            PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: STARTUP_SECONDS,
        }
    ):
        yield


def _check(address: str) -> None:
    import httpx
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    pair = _plain(PREFECT_API_AUTH_STRING.value()).partition(":")
    token = _plain(PREFECT_API_KEY.value())
    asked = f"{address.rstrip('/')}/flows/count"
    try:
        answer = httpx.post(
            asked,
            json={},
            timeout=ANSWER_SECONDS,
            auth=(pair[0], pair[2]) if pair[0] else None,
            headers={"Authorization": f"Bearer {token}"} if token else None,
        )
        if answer.status_code in (401, 403):
            raise UserError(
                f"PREFECT_API_URL is {address}: the server refuses "
                + (
                    "PREFECT_API_AUTH_STRING as it is set"
                    if pair[0]
                    else "access without a password; set PREFECT_API_AUTH_STRING=USER:PASSWORD"
                )
            )
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise UserError(
            f"PREFECT_API_URL is {address}, but no Prefect server answers there "
            f"({first_line(error)}); start it, or unset PREFECT_API_URL to run without one"
        ) from error


def _plain(secret: object) -> str:
    """A setting that Prefect keeps as a secret, or as text."""
    get = getattr(secret, "get_secret_value", None)
    return str(get() if get else secret or "")
