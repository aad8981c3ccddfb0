"""Faults, injected one by one: nothing is lost, nothing stands twice, the decision is the same."""

import errno
import itertools
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, suppress

import forked
import pytest
from forked import Forked
from mlflow.tracking import MlflowClient
from recorded import small_config, small_sweep
from waiting import until

from audit import spool
from audit.outage import passes, patience
from audit.reading import TrackingStore
from audit.store import Store
from audit.verify import verify
from flows.conduct import conduct
from flows.config import read_plan
from halfstep.errors import UserError

KILL_POINTS = 60
RUNS = 8
"""Of the small sweep: parent, two references, calibration, two cells, confirmation, entry."""
KILLS_A_CHAIN = 10


def once_each(store):
    client = MlflowClient(store.tracking_uri)
    homes = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(homes, "tags.`halfstep.record` != ''", max_results=1000)
    counted = Counter(r.data.tags["halfstep.record"] for r in runs if r.info.status == "FINISHED")
    assert set(counted.values()) == {1}
    assert {r.info.status for r in runs if r.data.tags["halfstep.kind"] != "ledger"} == {"FINISHED"}
    return len(counted)


def swept(config, store):
    done = forked.run("sweep", config, "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_sixty_random_kill_points(tmp_path):
    """Chains of sweeps, each killed several times at random moments and then left to end."""
    whole = Store(tmp_path / "whole")
    expected = small_sweep(tmp_path, whole)
    config, runs = tmp_path / "small.yaml", once_each(whole)
    rng, killed = random.Random(7), 0
    shutil.copytree(whole.path / "cache", tmp_path / "timed" / "cache")  # trained once
    forked.run("--version")  # the first is slow
    started = time.monotonic()
    swept(config, tmp_path / "timed")
    seconds = time.monotonic() - started
    for chain in itertools.count():
        if killed >= KILL_POINTS:
            break
        store = Store(tmp_path / f"chain-{chain}")  # MLflow keeps a database's engine by its path
        shutil.copytree(tmp_path / "timed" / "cache", store.path / "cache")
        for _ in range(KILLS_A_CHAIN):
            process = Forked(["sweep", config, "--store", store.path])
            time.sleep(rng.uniform(0.0, seconds))
            process.kill()
            if process.wait() != -signal.SIGKILL:  # it was faster
                break
            killed += 1
        assert swept(config, store.path)["decision"] == expected["decision"]
        assert once_each(store) == runs
        assert verify(TrackingStore(store)).findings == []
        shutil.rmtree(store.path)


def test_a_full_disk_at_any_write(tmp_path, monkeypatch):
    expected = small_sweep(tmp_path, Store(tmp_path / "whole"))["decision"]
    store, rng, real = Store(tmp_path / "mlruns"), random.Random(3), spool._write
    left = {"writes": 0}

    def full(path, data):
        left["writes"] -= 1
        if left["writes"] < 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    failed = 0
    with monkeypatch.context() as patch:
        patch.setattr(spool, "_write", full)
        for _ in range(8):
            left["writes"] = rng.randrange(25)
            with suppress(OSError):
                small_sweep(tmp_path, store)
                continue
            failed += 1
    assert failed >= 4
    assert small_sweep(tmp_path, store)["decision"] == expected
    assert verify(TrackingStore(store)).findings == []
    assert once_each(store) == RUNS


def test_a_full_disk_is_one_message(tmp_path):
    """A real limit: no file may grow beyond 40 KB."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from flows.cli import main; import flows.launch, torch; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); main()"
    )
    config, store = small_config(tmp_path), Store(tmp_path / "mlruns")
    done = subprocess.run(
        [sys.executable, "-c", code, "sweep", str(config), "--store", str(store.path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("halfstep: ")
    assert small_sweep(tmp_path, store)["decision"]["verdict"] == "accept"
    assert verify(TrackingStore(store)).findings == []


def test_a_locked_database(tmp_path, store):
    """Somebody holds MLflow's database for longer than SQLite waits, in mid-sweep."""
    expected = small_sweep(tmp_path, Store(tmp_path / "whole"))["decision"]
    held = []

    def hold():
        while not store.database.exists():
            time.sleep(0.01)
        with closing(sqlite3.connect(store.database, timeout=30, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            held.append(time.monotonic())
            time.sleep(12)
            other.execute("ROLLBACK")
            held.append(time.monotonic())

    thread = threading.Thread(target=hold)
    thread.start()
    result = small_sweep(tmp_path, store)
    ended = time.monotonic()
    thread.join()
    assert held[1] < ended, "the sweep waited for the lock"
    assert result["decision"] == expected
    assert once_each(store) == RUNS
    assert verify(TrackingStore(store)).findings == []


def test_the_clock_is_set_back_in_mid_sweep(tmp_path, store, monkeypatch):
    expected = small_sweep(tmp_path, Store(tmp_path / "whole"))["decision"]
    real, calls = time.time, [0]

    def back():
        calls[0] += 1
        return real() - 3600.0 * (calls[0] // 10)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", back)
        result = small_sweep(tmp_path, store)
    assert calls[0] > 30, "the clock was read, and went back, several times"
    assert result["decision"] == expected
    assert all(seconds >= 0 for seconds in result["seconds"].values())
    assert all(c["metrics"] is not None for c in result["cells"])
    client = MlflowClient(store.tracking_uri)
    for run in client.search_runs([result["experiment_id"]]):
        assert run.info.end_time >= run.info.start_time
        assert run.data.metrics.get("seconds", 0.0) >= 0
    assert verify(TrackingStore(store)).findings == []


def test_sigterm_finishes_the_record_and_says_how_to_go_on(tmp_path, store):
    def many(config):
        config["matrix"]["weights"] = {"format": ["int8", "int6", "int4", "int3"],
                                       "granularity": ["per_tensor", "per_channel"]}  # fmt: skip

    config = small_config(tmp_path, many)
    process = Forked(["sweep", config, "--store", store.path])
    until(
        lambda: len(list(store.spool.glob("*/cell/[!.]*/record.json"))) >= 3, process, pause=0.002
    )
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    assert err.splitlines()[-1] == (
        "halfstep: terminated; finished cells are kept, run the same command to go on"
    )
    client = MlflowClient(store.tracking_uri)
    home = client.get_experiment_by_name("tiny").experiment_id
    (parent,) = client.search_runs([home], "tags.`halfstep.kind` = 'sweep'")
    assert parent.info.status == "KILLED"
    assert "somebody ended it" in parent.data.tags["mlflow.note.content"]
    assert "run the same command to go on" in parent.data.tags["mlflow.note.content"]
    projected = client.search_runs([home], "tags.`halfstep.kind` = 'cell'")
    assert len(projected) >= 2, "what was handed over is in the trail; the rest is in the spool"
    report = verify(TrackingStore(store))
    assert report.findings == []
    plan = read_plan(config)
    whole = conduct(plan, config.read_text(), Store(tmp_path / "whole"))
    again = conduct(plan, config.read_text(), store)
    assert again["decision"] == whole["decision"]
    assert again["cells_reused"] >= 3
    assert once_each(store) == once_each(Store(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_record_is_whole(tmp_path, number):
    code = f"""
import os, signal, sys
from pathlib import Path
from audit import spool, termination
from audit.spool import Record
termination.listen()
real = spool._write
def write(path, data):
    if path.name == "record.json":
        os.kill(os.getpid(), {int(number)})
    real(path, data)
spool._write = write
try:
    spool.commit(Path(sys.argv[1]), Record("cell", "k", "n"), {{"a": b"1"}})
except termination.Stopped as error:
    print(error.number, spool.read(Path(sys.argv[1])).key)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cell")],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == [str(int(number)), "k"]


def locked_out(folder):
    """What MLflow's store raises where somebody else holds the database."""
    with (
        closing(sqlite3.connect(folder / "locked.db")) as holder,
        closing(sqlite3.connect(folder / "locked.db", timeout=0)) as other,
    ):
        holder.execute("CREATE TABLE t (x)")
        holder.execute("BEGIN EXCLUSIVE")
        return as_mlflow_raises(lambda: other.execute("INSERT INTO t VALUES (1)"))


def disk_full(folder):
    """The same where there is no room: a limit of the database's own, in pages."""
    with closing(sqlite3.connect(folder / "full.db")) as small:
        small.execute("CREATE TABLE t (x)")
        small.execute("PRAGMA max_page_count = 3")
        return as_mlflow_raises(lambda: small.execute("INSERT INTO t VALUES (zeroblob(99999))"))


def as_mlflow_raises(act):
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    try:
        try:
            act()
        except sqlite3.OperationalError as fault:
            raise OperationalError("INSERT", {}, fault) from fault
    except OperationalError as error:
        try:
            raise MlflowException(error) from error
        except MlflowException as found:
            return found


def test_what_passes_and_what_does_not(monkeypatch, tmp_path):
    import requests
    from mlflow.exceptions import MlflowException, RestException

    assert passes(MlflowException("no connection"))
    assert passes(requests.ConnectionError())
    assert passes(ConnectionResetError())
    assert passes(locked_out(tmp_path))
    assert not passes(disk_full(tmp_path))
    assert not passes(RestException({"error_code": "PERMISSION_DENIED", "message": "no"}))
    assert not passes(OSError(errno.ENOSPC, "full"))
    assert not passes(UserError("x"))
    assert not passes(KeyError("ours"))
    monkeypatch.setenv("HALFSTEP_PATIENCE", "7.5")
    assert patience() == 7.5
    monkeypatch.setenv("HALFSTEP_PATIENCE", "soon")
    with pytest.raises(UserError, match="HALFSTEP_PATIENCE is 'soon'"):
        patience()


def test_logs_are_json_lines_with_the_ids(tmp_path, store):
    config = small_config(tmp_path)
    done = forked.run("sweep", config, "--store", store.path, "--json", HALFSTEP_LOG="json")
    result = json.loads(done.stdout)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    events = Counter(line["event"] for line in lines)
    assert events == {"sweep.started": 1, "reference.finished": 2, "cell.finished": 2,
                      "confirmation.finished": 1, "sweep.finished": 1}  # fmt: skip
    assert {line["sweep"] for line in lines} == {result["sweep_id"]}
    cells = {line["cell"]: line for line in lines if line["event"] == "cell.finished"}
    assert set(cells) == {c["name"] for c in result["cells"]}
    assert all(line["seconds"] > 0 and line["level"] == "info" for line in cells.values())
    assert lines[-1]["seconds"]["cells"] > 0
    wrong = forked.run("sweep", config, HALFSTEP_LOG="xml")
    assert wrong.returncode == 2
    assert "HALFSTEP_LOG is 'xml'; allowed: text, json" in wrong.stderr
