"""Serving the MLflow UI on the store."""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from audit.store import Store
from halfstep.errors import UserError


def serve(store: Store, host: str, port: int) -> NoReturn:
    """Replaces this process by MLflow's server.

    Raises:
        UserError: the address is taken, or the store is not embedded.
    """
    if not store.embedded:
        raise UserError(f"MLFLOW_TRACKING_URI points to {store.shown_uri}: open that server's UI")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{host}:{port} cannot be listened on ({error.strerror}); name another with --port"
            ) from error
    address = f"http://{host}:{port}/#/experiments?workflowType=machine_learning"
    sys.stderr.write(f"MLflow UI on {store.path}: {address}  (Ctrl-C to stop)\n")
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
    }
    os.execve(
        sys.executable,
        [
            sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store.tracking_uri,
            "--host", host, "--port", str(port), "--workers", "1",
        ],
        environment,
    )  # fmt: skip
