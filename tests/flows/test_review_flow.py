"""Review in Prefect: the run stops until the form is filled in, and asks again if it must."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from mlflow.tracking import MlflowClient
from recorded import small_sweep
from waiting import LIMIT, until

from audit.issuer import Issuer
from audit.models import aliases
from audit.reading import TrackingStore
from audit.store import Store
from audit.verify import verify

FORM = {"outcome": "approve", "name": "Jane Doe", "role": "Head of ML", "comment": "fine"}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def server():
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=LIMIT):
        yield


@pytest.fixture
def swept(tmp_path):
    store = Store(tmp_path / "mlruns")
    result = small_sweep(tmp_path, store, issuer=Issuer("Ada Author"))
    return store, result["sweep_id"]


def runs(name):
    """Flow runs of that name, the newest first."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_flow_runs()
    return sorted((r for r in found if name in r.name), key=lambda r: r.created, reverse=True)


def deployment(client, name):
    from prefect.exceptions import ObjectNotFound

    with suppress(ObjectNotFound):  # not served yet
        return client.read_deployment_by_name(name)
    return None


def wait_for(name, *states):
    def there():
        found = runs(name)
        return found and found[0].state and found[0].state.name in states and found[0]

    return until(there, pause=0.5)


def resume(run, form):
    from prefect.flow_runs import resume_flow_run

    resume_flow_run(run.id, run_input=form)


def test_a_run_that_somebody_started_waits_and_asks_again(server, swept):
    from flows.review import review

    store, sweep = swept
    done = {}
    thread = threading.Thread(target=lambda: done.update(review(sweep, str(store.path))))
    thread.start()
    first = wait_for(sweep, "Paused")
    resume(first, FORM | {"name": "ada author"})

    def again():  # refused: the same run is paused once more
        now = runs(sweep)[0]
        return now.state.name == "Paused" and now.state.id != first.state.id and now

    resume(until(again, pause=0.5), FORM)
    thread.join(LIMIT)
    assert done["outcome"] == "approve"
    assert aliases(MlflowClient(store.tracking_uri), "tiny") == {"champion": "1"}
    assert verify(TrackingStore(store)).findings == []


def test_a_deployed_run_is_suspended_and_goes_on_elsewhere(server, swept):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    store, sweep = swept
    environment = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()}
    command = [sys.executable, "-m", "flows.cli", "review", "--serve", "--store", str(store.path)]
    worker = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        with get_client(sync_client=True) as client:
            deployed = until(lambda: deployment(client, "halfstep review/review"), pause=0.5)
            asked = client.create_flow_run_from_deployment(
                deployed.id, parameters={"sweep": sweep, "store": str(store.path)},
                name=f"review of {sweep}",
            )  # fmt: skip
        suspended = wait_for(sweep, "Suspended")
        assert suspended.id == asked.id
        assert aliases(MlflowClient(store.tracking_uri), "tiny") == {"candidate": "1"}
        resume(suspended, FORM | {"outcome": "approve with conditions", "conditions": ["watch"]})
        wait_for(sweep, "Completed")
    finally:
        os.killpg(worker.pid, signal.SIGTERM)
        told = worker.communicate(timeout=LIMIT)[0].decode()
    assert aliases(MlflowClient(store.tracking_uri), "tiny") == {"champion": "1"}, told
    assert verify(TrackingStore(store)).findings == []
