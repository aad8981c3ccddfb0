"""The runs that serve a sweep's queue on Prefect: which are replaced, and when that ends."""

import uuid
from types import SimpleNamespace

import httpx
import pytest
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed, Running

from flows import served
from flows.served import Served
from halfstep.errors import UserError


@pytest.fixture
def server(monkeypatch):
    """Prefect's, as far as it is asked: the state of each run."""
    states = {}

    def run_deployment(name, parameters, timeout):
        assert (name, parameters, timeout) == (served.DEPLOYMENT, {"depot": "s3://d"}, 0)
        run = uuid.uuid4()
        states[run] = Running()
        return SimpleNamespace(id=run)

    class Client:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read_flow_run(self, run):
            if isinstance(states[run], Exception):
                raise states[run]
            return SimpleNamespace(state=states[run])

    monkeypatch.setattr("prefect.deployments.run_deployment", run_deployment)
    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda sync_client: Client())
    monkeypatch.setattr(served, "LOOKED_AFTER", 0.0)
    return states


def ended(server, state, runs=None):
    for run in runs or [
        r for r, s in server.items() if not isinstance(s, Exception) and s.is_running()
    ]:
        server[run] = state


def test_a_run_that_ends_while_pieces_wait_is_replaced(server):
    two = Served("s3://d", 2)
    two.attend()
    assert len(server) == 2
    first, second = server
    ended(server, Crashed(message="exit code -9\nmore"), [first])
    two.attend()
    two.attend()
    assert len(server) == 3, "one for the one that died, once"
    ended(server, Completed(), [second])  # idle for too long
    two.attend()
    assert len(server) == 4


def test_runs_that_end_again_and_again_are_given_up(server):
    one = Served("s3://d", 1)
    for _ in range(served.REPLACED):
        ended(server, Crashed(message="no module named flows"))
        one.attend()
    one.progressed()  # a piece was done: it may go on
    for _ in range(served.REPLACED):
        ended(server, Crashed(message="no module named flows"))
        one.attend()
    ended(server, Crashed(message="no module named flows"))
    with pytest.raises(UserError, match="the last Crashed: no module named flows"):
        one.attend()


def test_what_somebody_cancels_is_not_started_again(server):
    two = Served("s3://d", 2)
    first, second = server
    ended(server, Cancelled(), [first])
    two.attend()
    assert len(server) == 2
    server[second] = ObjectNotFound(Exception("deleted"))
    with pytest.raises(UserError, match="every run that served this sweep was cancelled"):
        two.attend()


def test_without_the_server_the_queue_goes_on(server):
    one = Served("s3://d", 1)
    (run,) = server
    server[run] = httpx.ConnectError("no connection")
    one.attend()
    server[run] = Crashed()
    one.attend()
    assert len(server) == 2


def test_it_looks_now_and_then(server, monkeypatch):
    monkeypatch.setattr(served, "LOOKED_AFTER", 60.0)
    one = Served("s3://d", 1)
    ended(server, Crashed())
    one.attend()
    assert len(server) == 1
