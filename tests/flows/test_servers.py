"""A team's servers: MLflow on PostgreSQL with S3, Prefect on PostgreSQL, as deploy/ starts them;
what happens when one of them goes away, and when two machines are at work at once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from forked import Forked
from mlflow.tracking import MlflowClient
from recorded import small_config
from registry import MODEL, moved, register, trained, watching_config
from servers import BIN, ROOT, SECRETS, Team, answers, postgres_programs
from waiting import until

from flows.schedule import standing
from halfstep.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(postgres_programs() is None, reason="PostgreSQL is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
SUPPORT = str(Path(__file__).parent.parent / "support")


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    found = Team(tmp_path_factory.mktemp("team"))
    yield found
    found.stop()


@pytest.fixture
def on_server(team, monkeypatch):
    """This process, too, is a client of the team's MLflow."""
    for name, value in mlflow_of(team).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def on_prefect(team):
    """This process, too, is a client of the team's Prefect; what a machine sets for that alone."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    found = {k: v for k, v in team.client.items() if k.startswith("PREFECT")}
    with temporary_settings(
        {
            PREFECT_API_URL: found["PREFECT_API_URL"],
            PREFECT_API_AUTH_STRING: found["PREFECT_API_AUTH_STRING"],
        }
    ):
        yield found


def mlflow_of(team):
    return {k: v for k, v in team.client.items() if k.startswith("MLFLOW")}


def start(*arguments, settings):
    return Forked(arguments, {"PYTHONPATH": SUPPORT, **settings})


def run(*arguments, settings, code=0):
    process = start(*arguments, settings=settings)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return out, err


def sweep(config, store, settings, *options):
    out, _ = run("sweep", config, "--store", store, "--json", *options, settings=settings)
    return json.loads(out)


def only_once(name):
    """Every record of an experiment has one run, and all are finished."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    home = client.get_experiment_by_name(name).experiment_id
    runs = client.search_runs([home], max_results=1000)
    assert {r.info.status for r in runs} == {"FINISHED"}
    counted = Counter(r.data.tags["halfstep.record"] for r in runs)
    assert set(counted.values()) == {1}
    assert not any("halfstep-writer" in r.data.tags for r in runs)
    return len(runs)


def intact(store, settings, sweep=""):
    """The ledger, and all that it says of one sweep, or of everything."""
    named = [sweep] if sweep else []
    out, _ = run("verify", *named, "--store", store, "--json", settings=settings)
    assert json.loads(out)["findings"] == []


RUNS = 12 + 5
"""Of `many_cells`: its cells, parent, two references, calibration, confirmation."""


def many_cells(folder, name):
    """Enough cells for something to happen in the middle."""

    def change(config):
        config["name"] = name
        config["matrix"] = {
            "weights": {"format": ["int8", "int6", "int4"],
                        "granularity": ["per_tensor", "per_channel"]},
            "activations": {"format": "int8", "calibrator": ["minmax", "mse"]},
        }  # fmt: skip

    return small_config(folder, change)


def test_the_same_sweep_on_the_teams_servers(team, on_server, tmp_path):
    config = small_config(tmp_path, lambda c: c.update(name="whole"))
    here = sweep(config, tmp_path / "embedded", {})
    there = sweep(config, tmp_path / "client", team.client)
    assert there["decision"] == here["decision"]
    assert [c["outcomes_digest"] for c in there["cells"]] == [
        c["outcomes_digest"] for c in here["cells"]
    ]
    assert only_once("whole") == 7
    assert not (tmp_path / "client" / "mlflow.db").exists()
    kinds = team.postgres.sql("select count(*) from runs where status = 'FINISHED'").strip()
    assert int(kinds) >= 7
    listed = urllib.request.urlopen(f"{team.s3.address}/halfstep?list-type=2", timeout=10).read()
    assert b"evidence.json" in listed, "artifacts lie in the bucket"
    settings = mlflow_of(team)
    intact(tmp_path / "client", settings)
    out, _ = run("list", "--store", tmp_path / "another", "--json", settings=settings)
    assert there["sweep_id"] in {s["sweep_id"] for s in json.loads(out)["sweeps"]}
    run("export", there["sweep_id"], tmp_path / "pack", "--store", tmp_path / "client",
        settings=settings)  # fmt: skip
    again = sweep(config, tmp_path / "client", team.client)
    assert again["reused"]


APPENDING = """
import sys
from pathlib import Path
from audit.ledger import ANALYSIS, Settings
from audit.ledger_runs import LedgerWriter
from audit.store import Store
from audit.trail import connect
store = Store(Path(sys.argv[1]))
writer = LedgerWriter(store, connect(store))
for number in range(int(sys.argv[2])):
    what = {"run_id": "none", "evidence": "none", "by": sys.argv[1], "number": number}
    shows = {"tags": {}, "note": "a race"}
    writer.append("reproduction", f"{sys.argv[1]}:{number}", "race", what, Settings(), shows)
"""


def test_machines_that_enter_the_ledger_at_once(team, on_server, tmp_path):
    from audit.ledger import EXPERIMENT

    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    racing = [
        subprocess.Popen([sys.executable, "-c", APPENDING, str(tmp_path / name), "4"],
                         env={**clean, **mlflow_of(team)}, cwd=ROOT, stderr=subprocess.PIPE)
        for name in "abc"
    ]  # fmt: skip
    for process in racing:
        _, err = process.communicate()
        assert process.returncode == 0, err
    client = MlflowClient(team.mlflow.address)
    home = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([home.experiment_id], "tags.`halfstep.kind` = 'ledger'")
    raced = [r for r in runs if "race" in r.info.run_name]
    assert len(raced) == 12
    intact(tmp_path / "a", mlflow_of(team))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "no"}, "error code 401"),
        ({"PREFECT_API_AUTH_STRING": "admin:no"}, "the server refuses PREFECT_API_AUTH_STRING"),
        ({"PREFECT_API_AUTH_STRING": ""}, "set PREFECT_API_AUTH_STRING=USER:PASSWORD"),
    ],
)
def test_a_wrong_password_is_named_before_anything_is_written(team, tmp_path, wrong, message):
    settings = {**team.client, **wrong}
    _, err = run("sweep", small_config(tmp_path), "--store", tmp_path / "s", settings=settings,
                 code=2)  # fmt: skip
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "s").exists()
    for secret in SECRETS.values():
        assert secret == "halfstep" or secret not in err


def test_doctor_names_what_is_wrong_with_each_address(team, tmp_path):
    settings = {**team.client, **team.depot_access, "HALFSTEP_DEPOT": "s3://halfstep/depot"}

    def checks(code, **wrong):
        out, _ = run("doctor", "--store", tmp_path, "--json", settings={**settings, **wrong},
                     code=code)  # fmt: skip
        return {c["check"]: c for c in json.loads(out)["checks"]}

    well = checks(0)
    assert [well[n]["status"] for n in ("tracking", "artifacts", "prefect", "depot")] == ["ok"] * 4
    for name, wrong, told in (
        ("tracking", {"MLFLOW_TRACKING_PASSWORD": "no"}, "401"),
        ("prefect", {"PREFECT_API_AUTH_STRING": "admin:no"}, "refuses"),
        ("depot", {"HALFSTEP_DEPOT": "s3://no-such-bucket/depot"}, "s3://no-such-bucket/depot"),
    ):
        found = checks(2, **wrong)[name]
        assert found["status"] == "fail"
        assert told in found["found"]


def test_the_tracking_server_goes_away_for_half_a_minute(team, on_server, tmp_path):
    config, store = many_cells(tmp_path, "outage"), tmp_path / "client"
    process = start("sweep", config, "--store", store, "--json", settings=mlflow_of(team))
    client = MlflowClient(team.mlflow.address)
    until(lambda: recorded(client, "outage") >= 2)
    team.mlflow.kill()
    time.sleep(30)
    team.mlflow.start()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "cannot be written" in err
    assert "can be written again" in err
    assert secretless(err)
    assert only_once("outage") == RUNS
    found = json.loads(out)
    intact(store, mlflow_of(team), found["sweep_id"])
    whole = sweep(config, tmp_path / "embedded", {})
    assert found["decision"] == whole["decision"]


def test_a_server_that_stays_away_ends_in_one_message_and_nothing_is_lost(
    team, on_server, tmp_path
):
    config, store = many_cells(tmp_path, "away"), tmp_path / "client"
    impatient = {**mlflow_of(team), "HALFSTEP_PATIENCE": "3"}
    process = start("sweep", config, "--store", store, "--json", settings=impatient)
    client = MlflowClient(team.mlflow.address)
    until(lambda: recorded(client, "away") >= 2)
    team.mlflow.kill()
    out, err = process.communicate()
    team.mlflow.start()
    assert (process.returncode, out) == (2, "")
    assert "run the same command again to record it" in err.splitlines()[-1]
    assert "Traceback" not in err
    found = sweep(config, store, mlflow_of(team))
    assert found["decision"]["verdict"] == "accept"
    only_once("away")
    intact(store, mlflow_of(team), found["sweep_id"])


def recorded(client, name):
    home = client.get_experiment_by_name(name)
    return len(client.search_runs([home.experiment_id])) if home else 0


def secretless(text):
    return not any(s in text for s in SECRETS.values() if s != "halfstep")


class Refusing:
    """Stands before the S3 server, passes every byte on, and refuses while it is told to."""

    ANSWER = (
        b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: 44\r\n"
        b"Connection: close\r\n\r\n<Error><Code>AccessDenied</Code></Error>    "
    )

    def __init__(self, port):
        self._behind, self._open, self._refuses, self.refused = port, [], False, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def refuses(self):
        return self._refuses

    @refuses.setter
    def refuses(self, value):
        self._refuses = value
        for one in self._open:  # connections that are kept alive would go on as before
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self):
        self.refuses = True
        self._listener.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._refuses:
                    self.refused += 1
                    with suppress(OSError), client:
                        client.recv(65536)
                        client.sendall(self.ANSWER)
                    continue
                server = socket.create_connection(("127.0.0.1", self._behind))
                self._open += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pipe, args=(one, other), daemon=True).start()

    @staticmethod
    def _pipe(one, other):
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_an_artifact_store_that_refuses_for_a_while(team, on_server, tmp_path):
    before = Refusing(team.s3.port)
    plain = dict(team.mlflow.settings)
    team.mlflow.stop()
    team.mlflow.settings["MLFLOW_S3_ENDPOINT_URL"] = before.address
    team.mlflow.start()
    try:
        config, store = many_cells(tmp_path, "refused"), tmp_path / "client"
        process = start("sweep", config, "--store", store, "--json", settings=mlflow_of(team))
        until(lambda: recorded(MlflowClient(team.mlflow.address), "refused") >= 2)
        before.refuses = True
        until(lambda: before.refused >= 3)
        before.refuses = False
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "cannot be written" in err
        found = json.loads(out)
        assert found["decision"]["verdict"] == "accept"
        assert only_once("refused") == RUNS
        intact(store, mlflow_of(team), found["sweep_id"])
    finally:
        team.mlflow.stop()
        team.mlflow.settings = plain
        team.mlflow.start()
        before.close()


def test_the_same_sweep_from_two_machines_at_once(team, on_server, tmp_path):
    config = many_cells(tmp_path, "twice")
    stores = [tmp_path / "one", tmp_path / "two"]
    both = [start("sweep", config, "--store", store, "--json", settings=mlflow_of(team))
            for store in stores]  # fmt: skip
    ended = [process.communicate() for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], ended
    lost = codes.index(2)
    assert "the same sweep is being written to" in ended[lost][1].splitlines()[-1]
    assert only_once("twice") == RUNS
    again = sweep(config, stores[lost], mlflow_of(team))
    assert again["decision"] == json.loads(ended[1 - lost][0])["decision"]
    assert only_once("twice") == RUNS
    intact(stores[lost], mlflow_of(team), again["sweep_id"])


def test_a_sweep_that_was_ended_on_one_machine_goes_on_on_another(team, on_server, tmp_path):
    """The other has none of its records: what it measured stands in the trail once, and whole."""
    config, settings = many_cells(tmp_path, "moved"), mlflow_of(team)
    first = start("sweep", config, "--store", tmp_path / "one", settings=settings)
    # Looked for on the disk: a busy server answers after the sweep has ended.
    until(lambda: list(tmp_path.glob("one/spool/*/cell/[!.]*/record.json")), first)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 143
    assert 0 < recorded(MlflowClient(team.mlflow.address), "moved") < RUNS
    found = sweep(config, tmp_path / "two", settings)
    assert found["decision"]["verdict"] == "accept"
    assert only_once("moved") == RUNS
    intact(tmp_path / "two", settings, found["sweep_id"])
    there = sweep(config, tmp_path / "one", settings)
    assert there["run_id"] == found["run_id"]
    assert only_once("moved") == RUNS


def test_a_prefect_server_that_is_restarted(team, on_server, tmp_path):
    config, store = many_cells(tmp_path, "restarted"), tmp_path / "client"
    process = start("sweep", config, "--store", store, "--json", settings=team.client)
    until(lambda: len(list(store.glob("spool/*/cell/[!.]*/record.json"))) >= 2)
    team.prefect.kill()
    time.sleep(3)
    team.prefect.start()
    out, err = process.communicate()
    if process.returncode != 0:  # Prefect gave up: the same command goes on
        assert "Traceback" not in err
        out, _ = run("sweep", config, "--store", store, "--json", settings=team.client)
    found = json.loads(out)
    assert found["decision"]["verdict"] == "accept"
    assert only_once("restarted") == RUNS
    intact(store, mlflow_of(team), found["sweep_id"])


def test_a_served_schedule_runs_one_at_a_time(team, on_prefect, tmp_path):
    from prefect.client.orchestration import get_client
    from prefect.deployments import run_deployment

    config, store = small_config(tmp_path, lambda c: c.update(name="nightly")), tmp_path / "store"
    served = start("schedule", config, "--store", store, "--cron", "0 3 * * *", "--timezone",
                   "Europe/Berlin", settings=on_prefect)  # fmt: skip

    def planned():
        with suppress(UserError):  # not served yet
            found = standing("nightly")
            return found["next"] and found
        return None

    try:
        found = until(planned, served, pause=0.5)
        assert found["cron"] == ["0 3 * * *"]
        assert found["last"] is None
        assert found["missed"] == []
        asked = [run_deployment("halfstep sweep/nightly", timeout=0) for _ in range(2)]
        with get_client(sync_client=True) as client:

            def ended():
                states = [client.read_flow_run(one.id).state for one in asked]
                return all(state.is_final() for state in states) and states

            states = until(ended, served, pause=0.5)
        assert sorted(state.type.value for state in states) == ["CANCELLED", "COMPLETED"]
        out, _ = run("schedule", config, "--store", store, "--json", settings=on_prefect)
        assert json.loads(out)["last"]["state"] == "Completed"
    finally:
        served.send_signal(signal.SIGINT)
        served.communicate()
    assert len(list((store / "spool").glob("*/sweep.json"))) == 1


def test_a_real_webhook_wakes_the_watcher(team, on_server, tmp_path, monkeypatch):
    from audit.store import Store
    from audit.versions import announce_to

    register(Store(tmp_path / "trainer"), trained(), tmp_path, MODEL)
    config = watching_config(tmp_path)
    settings = {**mlflow_of(team), "HALFSTEP_WEBHOOK_SECRET": "hook-secret"}
    process = start("watch", config, "--store", tmp_path / "client", "--interval", "600", "--json",
                    "--listen", "127.0.0.1:0", settings=settings)  # fmt: skip

    def event(number):
        until(lambda: process.stdout.read().count("\n") > number, process)
        return json.loads(process.stdout.read().splitlines()[number])

    first = event(0)
    address = re.search(r"webhooks are heard on (\S+)", process.stderr.read())[1]
    store = Store(tmp_path / "client")
    announce_to(store, f"http://{address}/", "hook-secret", MODEL)
    announce_to(store, f"http://{address}/", "hook-secret", MODEL)
    assert len(MlflowClient(team.mlflow.address).list_webhooks()) == 1, "announced once"
    version = register(Store(tmp_path / "trainer"), moved(0.001), tmp_path, MODEL)
    second = event(1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert (first["event"], second["event"]) == ("swept", "stands")
    assert second["version"] == version
    assert process.returncode == 143


def test_workers_of_a_pool_and_the_deployments_of_the_file(team, on_server, tmp_path):
    """`prefect deploy --all` deploys every flow; a sweep runs on two workers over S3, one of which
    is killed."""
    settings = {**team.client, **team.depot_access,
                "HALFSTEP_CACHE": str(tmp_path / "cache")}  # fmt: skip
    environment = {**os.environ, **settings}

    def prefect(*arguments):
        done = subprocess.run([BIN / "prefect", *arguments], env=environment, cwd=ROOT, text=True,
                              capture_output=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefect("work-pool", "create", "halfstep", "--type", "process")
    prefect("--no-prompt", "deploy", "--all")
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    listed = prefect("deployment", "ls")
    assert all(one["name"] in listed for one in deployed)
    worker = subprocess.Popen(
        [BIN / "prefect", "worker", "start", "--pool", "halfstep", "--type", "process"],
        env={**environment, "HALFSTEP_HOME": str(ROOT)}, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        config = many_cells(tmp_path, "pooled")
        here = sweep(config, tmp_path / "embedded", {})
        process = start("sweep", config, "--store", tmp_path / "client", "--json", "--runner",
                        "prefect", "--depot", "s3://halfstep/depot", settings=settings)  # fmt: skip
        until(lambda: recorded(MlflowClient(team.mlflow.address), "pooled") >= 5)
        # Of this pool's worker only: other tests run flows of their own on this machine.
        runs = [one for one in psutil.Process(worker.pid).children(recursive=True)
                if "engine" in " ".join(one.cmdline())]  # fmt: skip
        assert runs
        for one in runs:  # new runs are started in their place
            one.kill()
        out, err = process.communicate()
        assert process.returncode == 0, err
        found = json.loads(out)
        assert found["decision"] == here["decision"]
        assert only_once("pooled") == RUNS
        intact(tmp_path / "client", mlflow_of(team), found["sweep_id"])
    finally:
        for one in [*psutil.Process(worker.pid).children(recursive=True), worker]:
            one.kill()
        worker.wait()


def test_prefect_answers_with_metrics(team):
    import base64

    pair = base64.b64encode(f"admin:{SECRETS['PREFECT_PASSWORD']}".encode()).decode()
    header = {"Authorization": f"Basic {pair}"}
    request = urllib.request.Request(f"{team.prefect.address}/api/metrics", headers=header)
    text = urllib.request.urlopen(request, timeout=10).read().decode()
    assert "# TYPE" in text
    assert answers(f"{team.mlflow.address}/health")


def test_a_dump_and_a_restore_of_the_trail(team, on_server, tmp_path):
    """As docs/operate.md says it for PostgreSQL."""
    config = small_config(tmp_path, lambda c: c.update(name="kept"))
    found = sweep(config, tmp_path / "client", mlflow_of(team))
    where = ["--host=127.0.0.1", f"--port={team.postgres.port}", "--username=halfstep"]
    dump = team.postgres.run("pg_dump", *where, "--format=plain", "mlflow")
    client = MlflowClient(team.mlflow.address)
    client.delete_run(found["cells"][0]["run_id"])
    out, _ = run("verify", found["sweep_id"], "--store", tmp_path / "client", "--json",
                 settings=mlflow_of(team), code=4)  # fmt: skip
    assert "deleted" in out
    team.mlflow.stop()
    for command in ("DROP DATABASE mlflow", "CREATE DATABASE mlflow"):
        team.postgres.sql(command, "postgres")
    file = team.folder / "dump.sql"
    file.write_text(dump)
    file.chmod(0o644)
    team.postgres.run("psql", *where, "--dbname=mlflow", "--quiet", f"--file={file}")
    team.mlflow.start()
    intact(tmp_path / "client", mlflow_of(team), found["sweep_id"])
