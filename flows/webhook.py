"""Being told of new model versions by an MLflow server: a receiver that only wakes the watcher.

What a message says is not believed beyond that: the watcher then asks the registry itself. So a
message that is lost, comes twice, late or out of order changes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from halfstep.errors import UserError

LARGEST = 64 * 1024
LENGTH = re.compile("[0-9]{1,9}")
OLDEST = 300.0
"""Seconds: a message that was signed longer ago is refused, as it may be a replay."""
SIGNATURE, TIMESTAMP, DELIVERY = (
    "X-MLflow-Signature",
    "X-MLflow-Timestamp",
    "X-MLflow-Delivery-Id",
)
SIGNATURE_VERSION = "v1"


def signature(secret: str, delivery: str, timestamp: str, payload: bytes) -> str:
    """As MLflow signs: HMAC-SHA256 over ``<delivery id>.<timestamp>.<payload>``."""
    signed = f"{delivery}.{timestamp}.".encode() + payload
    made = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return f"{SIGNATURE_VERSION},{base64.b64encode(made).decode()}"


def refusal(
    secret: str, headers: Mapping[str, str], payload: bytes, now: float
) -> tuple[int, str] | None:
    """Why a message is not taken: the HTTP status and the reason; None where it is."""
    given, timestamp = headers.get(SIGNATURE, ""), headers.get(TIMESTAMP, "")
    delivery = headers.get(DELIVERY, "")
    wanted = signature(secret, delivery, timestamp, payload)
    if not hmac.compare_digest(given.encode(), wanted.encode()):
        return 401, "the signature is not that of the secret"
    if not timestamp.isdigit() or abs(now - int(timestamp)) > OLDEST:
        return 400, "the message is too old, or the clocks differ"
    return None


def concerns(payload: bytes, model: str) -> bool:
    """Whether a message is about a new version of this model."""
    try:
        message = json.loads(payload)
        return bool(
            message["entity"] == "model_version"
            and message["action"] == "created"
            and message["data"]["name"] == model
        )
    except (ValueError, KeyError, TypeError):
        return False


@contextmanager
def listening(
    address: str, secret: str, model: str, wake: Callable[[], None]
) -> Iterator[tuple[str, int]]:
    """Receives while open; ``wake`` is called for every message about the model. Yields where.

    Raises:
        UserError: the address cannot be listened on.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise UserError(f"--listen {address!r} is not allowed: HOST:PORT, as in 0.0.0.0:8080")

    class Receiver(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length") or ""
            if not LENGTH.fullmatch(length):
                self._answer(411, "the message does not say its length")
                return
            if int(length) > LARGEST:
                self._answer(413, "too large")
                return
            payload = self.rfile.read(int(length))
            found = refusal(secret, self.headers, payload, time.time())  # type: ignore[arg-type]
            if found is not None:
                self._answer(*found)
                return
            if concerns(payload, model):
                wake()
            self._answer(200, "heard")

        def _answer(self, status: int, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """What comes in is the watcher's to tell."""

    try:
        server = ThreadingHTTPServer((host or "127.0.0.1", int(port)), Receiver)
    except (OSError, OverflowError) as error:
        raise UserError(f"--listen {address}: {error}") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield str(server.server_address[0]), int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
