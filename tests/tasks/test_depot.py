"""A depot in a bucket that goes away, comes back, or refuses."""

import threading
import time

import pytest
from servers import S3

from halfstep.errors import UserError
from tasks import depot as depots
from tasks.depot import Depot

AWAY = "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect"
OVERLOADED = "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body."
DENIED = "AWS Error ACCESS_DENIED during HeadObject operation: No response body."


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An S3 server, and the address of a depot in its bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    server = S3(tmp_path)
    where = f"scheme=http&endpoint_override=127.0.0.1:{server.port}&region=us-east-1"
    yield server, f"s3://halfstep/depot?{where}"
    server.stop()


def failing(held, *messages):
    """The next calls of the depot's file system fail so."""
    left, real = list(messages), held._files

    class Files:
        def __getattr__(self, name):
            if left:
                raise OSError(left.pop(0))
            return getattr(real, name)

    held._files = Files()
    return left


def test_an_outage_is_waited_for(bucket, monkeypatch):
    """Arrow itself gives up after six seconds."""
    server, address = bucket
    monkeypatch.setattr(depots, "PAUSE", 0.1)
    said = []
    held = Depot(address, said.append)
    held.check()
    server.stop()
    back = threading.Timer(8.0, server.start)
    began = time.monotonic()
    back.start()
    assert held.read("x") is None  # moto forgets everything
    assert time.monotonic() - began > 6.0
    back.join()
    assert len(said) == 1
    assert "cannot be used" in said[0]
    assert "waiting for it up to" in said[0]


def test_what_passes_is_tried_again_and_a_refusal_is_not(bucket, monkeypatch):
    _, address = bucket
    monkeypatch.setattr(depots, "PAUSE", 0.01)
    said = []
    held = Depot(address, said.append)
    failing(held, AWAY, OVERLOADED, AWAY)
    held.write("x", b"kept")
    assert held.read("x") == b"kept"
    assert len(said) == 1, "said once, however often it is tried"
    left = failing(held, DENIED, AWAY)
    with pytest.raises(UserError, match="ACCESS_DENIED"):
        held.read("x")
    assert left == [AWAY], "it was not asked again"


def test_patience_ends_and_the_first_look_has_none(bucket, monkeypatch):
    _, address = bucket
    monkeypatch.setattr(depots, "PAUSE", 0.01)
    held = Depot(address)
    failing(held, AWAY)
    with pytest.raises(UserError, match="cannot be used"):
        held.check()
    monkeypatch.setenv("HALFSTEP_PATIENCE", "0.05")
    failing(held, *[AWAY] * 100)
    with pytest.raises(UserError, match="Could not connect"):
        held.read("x")


def test_a_folder_that_fails_fails_at_once(tmp_path):
    held = Depot(str(tmp_path))
    left = failing(held, AWAY, AWAY)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        held.read("x")
    assert len(left) == 1
