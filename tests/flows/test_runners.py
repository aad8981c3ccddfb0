"""Workers: the same bits as one process alone, on Dask, on Ray, and from the queue of a depot."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from recorded import small_config
from waiting import LIMIT

from audit import spool
from audit.reading import TrackingStore
from audit.spool import Record
from audit.store import Store
from audit.verify import verify
from flows.conduct import conduct
from flows.config import read_plan
from flows.crew import Team
from flows.runners import Runner
from halfstep.errors import UserError
from halfstep.observe import SEGMENTS, calibrate, canonical, merged, observe_part, parts_of
from halfstep.tally import Tally
from tasks.calibrate import calibrated_sites
from tasks.depot import Depot
from tasks.load import load
from tasks.queue import Worker, publish
from tasks.work import CalibrationWork, CellWork, Done, Kit, ReferenceWork, WeightsWork, perform


def evidence(result):
    return (
        result["decision"],
        [(c["name"], c["task"], c["key"], c["outcomes_digest"], c["certificate"], c["metrics"])
         for c in result["cells"]],
        result["calibration"]["representativeness"],
        result["calibration"]["unsettled"],
    )  # fmt: skip


def corrected(config):
    """Weights with corrections, static activations, positions, and a rewrite of the model."""
    config["matrix"] = {
        "weights": {"format": ["int8", "int4"], "granularity": "per_channel"},
        "activations": {"format": "int8", "calibrator": ["mse", "percentile"]},
        "corrections": ["none", "gptq", "smoothquant + bias_correction"],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The corrected sweep, by one process alone."""
    folder = tmp_path_factory.mktemp("whole")
    config = small_config(folder, corrected)
    return conduct(read_plan(config), config.read_text(), Store(folder / "mlruns"))


def team_of(depot, act=perform):
    return Team(depot, lambda work: lambda: act(work), 2)


def test_a_team_comes_to_the_same_bits(whole, tmp_path, store):
    config = small_config(tmp_path, corrected)
    depot = Depot(str(tmp_path / "depot"))
    team = team_of(depot)
    result = conduct(read_plan(config), config.read_text(), store, crew=team)
    assert evidence(result) == evidence(whole)
    assert verify(TrackingStore(store)).findings == []
    kinds = [type(work) for work, _ in team.done]
    assert kinds.count(ReferenceWork) == 2
    assert kinds.count(CalibrationWork) > 1, "calibration was divided"
    assert kinds.count(CellWork) == len(result["cells"]) + 1
    made = [key for work, _ in team.done if isinstance(work, WeightsWork) for key in work.weights]
    assert len(made) == len(set(made)) > 0, "every weight is quantized once"


def test_what_is_shared_travels_once_a_worker(tmp_path, store):
    """Each piece of the depot is read once by a process, however many cells need it."""
    import tasks.work

    for cached in (tasks.work._depot, tasks.work._loaded, tasks.work._treatments):
        cached.cache_clear()
    config = small_config(tmp_path, corrected)
    team = team_of(Depot(str(tmp_path / "depot")))
    conduct(read_plan(config), config.read_text(), store, crew=team)
    cells = [done.bytes_read for work, done in team.done if isinstance(work, CellWork)]
    worker = tasks.work._depot(str(tmp_path / "depot"))
    pieces = list((tmp_path / "depot" / "pieces").rglob("*"))
    assert worker.traffic.pieces_read <= len([p for p in pieces if p.is_file()])
    assert sum(b == 0 for b in cells) >= len(cells) // 2, "later cells read nothing new"


def test_resumed_from_what_workers_left(whole, tmp_path, store):
    """The conductor dies; what its workers finished lies in the depot."""
    config, depot = small_config(tmp_path, corrected), Depot(str(tmp_path / "depot"))
    plan, text, left = read_plan(config), config.read_text(), [9]

    def dies(work):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return perform(work)

    with pytest.raises(KeyboardInterrupt):
        conduct(plan, text, store, crew=team_of(depot, dies))
    again = team_of(depot)
    other = Store(tmp_path / "another")  # even another store takes it up
    result = conduct(plan, text, other, crew=again)
    assert evidence(result) == evidence(whole)
    assert sum(done.seconds == 0 for _, done in again.done) >= 8


def test_a_worker_that_dies_is_replaced_and_one_that_always_dies_is_named(tmp_path, store):
    config, depot = small_config(tmp_path), Depot(str(tmp_path / "depot"))
    tries = {}

    def flaky(work):
        tries[work.key] = tries.get(work.key, 0) + 1
        if tries[work.key] < 3:
            raise ConnectionError("worker lost")
        return perform(work)

    result = conduct(read_plan(config), config.read_text(), store, crew=team_of(depot, flaky))
    assert result["decision"]["verdict"] == "accept"

    def dead(work):
        raise ConnectionError("worker lost")

    with pytest.raises(UserError, match="failed 3 times on the workers, last with ConnectionErr"):
        conduct(read_plan(config), config.read_text(), Store(tmp_path / "b"),
                crew=team_of(Depot(str(tmp_path / "d2")), dead))  # fmt: skip


def test_a_worker_with_other_code_takes_no_part(tmp_path, store, monkeypatch):
    import tasks.work

    config = small_config(tmp_path)
    tasks.work._loaded.cache_clear()
    real = tasks.work.implementation
    monkeypatch.setattr(
        tasks.work, "implementation", lambda plugins: {**real(plugins), "cpu_capability": "VAX"}
    )
    with pytest.raises(UserError, match=r"would not compute what .*: cpu_capability VAX here, "):
        conduct(read_plan(config), config.read_text(), store,
                crew=team_of(Depot(str(tmp_path / "depot"))))  # fmt: skip


def test_deployed_cells_on_workers(tmp_path, store, monkeypatch):
    """Their outcomes are those of one process; a worker with another version takes no part."""
    import tasks.work
    from backends import backend

    def deployed(config):
        config["matrix"] = {
            "weights": {"format": "int8"},
            "activations": {"format": "uint8"},
            "backend": "onnxruntime",
        }
        config["deployment"] = {"queries": 64, "batch_sizes": [1]}

    config = small_config(tmp_path, deployed)
    plan, text = read_plan(config), config.read_text()
    alone = conduct(plan, text, store)
    crew = team_of(Depot(str(tmp_path / "depot")))
    shared = conduct(plan, text, Store(tmp_path / "other"), crew=crew)
    assert [c["outcomes_digest"] for c in shared["cells"]] == [
        c["outcomes_digest"] for c in alone["cells"]
    ]
    assert shared["cells"][1]["artefact"] == alone["cells"][1]["artefact"]
    real = tasks.work.identity
    monkeypatch.setattr(tasks.work, "identity", lambda *args: (real(*args)[0], "another"))
    with pytest.raises(UserError, match=f"has onnxruntime {backend('onnxruntime').version()}, the"):
        conduct(plan, text, Store(tmp_path / "third"), crew=team_of(Depot(str(tmp_path / "d3"))))


@pytest.mark.parametrize("count", [8, 16, SEGMENTS])
def test_calibration_on_many_workers_merges_to_the_same_bits(tmp_path, store, count):
    """Real activations, real data: every observation, its growth and its channels."""
    config = small_config(tmp_path, lambda c: c["tasks"][0]["splits"]["calibration"].update(
        samples=700))  # fmt: skip
    loaded = load(read_plan(config), store)
    sites, inputs = calibrated_sites(loaded), loaded.calibration
    order = canonical(inputs)
    alone = calibrate(loaded.model, sites, map(inputs.batch, order), positions=True,
                      examples=len(inputs))  # fmt: skip
    sizes = [len(rows) for rows in order]
    parts = parts_of(sizes, count)
    assert len(parts) == min(count, len(order))
    made = {}
    for part in reversed(parts):  # whoever is done first
        tallies = observe_part(loaded.model, sites, map(inputs.batch, order[part.batches]), part,
                               examples=len(inputs), positions=True)  # fmt: skip
        made[part.before] = {name: Tally.from_tensors(t.tensors()) for name, t in tallies.items()}
    together = merged(((part, made[part.before]) for part in parts), sizes)
    for name, observation in alone.items():
        mine, theirs = observation.tensors(), together[name].tensors()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[part], theirs[part]) for part in mine)


def test_a_depot_keeps_what_its_digests_say(tmp_path):
    depot = Depot(str(tmp_path / "d"))
    depot.check()
    big = torch.randn(300, 300)
    tied = {"a": big, "b": torch.nn.Linear(4, 2), "half": big[:, ::2], "none": torch.empty(0, 3)}
    tied["c"] = tied["b"].weight
    digest = depot.pack(tied)
    found = Depot(str(tmp_path / "d")).unpack(digest)
    assert torch.equal(found["a"], big)
    assert torch.equal(found["half"], big[:, ::2])
    assert found["none"].shape == (0, 3)
    assert found["c"] is found["b"].weight, "what was one stays one"
    assert depot.pack(tied) == digest
    (piece,) = [p for p in (tmp_path / "d" / "pieces").rglob(digest) if p.is_file()]
    piece.write_bytes(piece.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="is not what was written"):
        Depot(str(tmp_path / "d")).unpack(digest)
    piece.unlink()
    with pytest.raises(UserError, match="has lost piece"):
        Depot(str(tmp_path / "d")).unpack(digest)
    with pytest.raises(UserError, match=r"cannot be sent to workers .*--runner"):
        depot.pack(lambda: 1)
    with pytest.raises(UserError, match="depot nosuch://x cannot be used"):
        Depot("nosuch://x")


def serve(depot, name):
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "work", str(depot), "--idle", "30"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HALFSTEP_CACHE": str(Path(depot).parent / name)},
    )  # fmt: skip


@pytest.mark.slow
def test_the_queue_outlives_a_killed_worker(whole, tmp_path, store, monkeypatch):
    """Two workers; the first is killed with a piece in its hands, the second ends by SIGTERM."""
    config, place = small_config(tmp_path, corrected), tmp_path / "depot"
    first = serve(place, "one")
    sweep = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "sweep", str(config), "--store", str(store.path),
         "--runner", "queue", "--depot", str(place), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = iter(first.stderr.readline, "")
    assert any(" · selection" in line and line.startswith("W ") for line in said)
    first.kill()
    first.communicate()
    second = serve(place, "two")
    out, err = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 0, err
    assert evidence(json.loads(out)) == evidence(whole)
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=LIMIT)
    assert second.returncode == 143
    assert not list((place / "queue").iterdir())
    assert verify(TrackingStore(store)).findings == []


def test_a_claim_that_stands_still_is_a_dead_workers(tmp_path, monkeypatch):
    import tasks.queue

    monkeypatch.setattr(tasks.queue, "STALE_AFTER", 0.5)
    depot = Depot(str(tmp_path / "d"))
    work = ReferenceWork(Kit(depot.address, "none"), "k" * 64, "t", "selection")
    publish(depot, 0, work)
    depot.write(f"claims/{work.key}", b"somebody-else 3")
    worker, asked = Worker(depot), time.monotonic()
    while next(worker._free(), None) is None:
        depot.write(f"claims/{work.key}", b"somebody-else 3")
        assert time.monotonic() < asked + 10
        time.sleep(0.05)
    assert time.monotonic() - asked >= 0.5


def test_what_a_worker_cannot_do_is_told_to_the_conductor(tmp_path, monkeypatch):
    import tasks.queue

    depot = Depot(str(tmp_path / "d"))
    work = ReferenceWork(Kit(depot.address, "none"), "k" * 64, "t", "selection")
    wait = publish(depot, 0, work)
    for error, message in (
        (UserError("NaN it is"), "NaN it is"),
        (KeyError("x"), r"KeyError\('x'"),
    ):

        def fails(work, error=error):
            raise error

        monkeypatch.setattr(tasks.queue, "perform", fails)
        wait = publish(depot, 0, work)
        assert Worker(depot).serve(0.0, lambda text: None) == 1
        with pytest.raises(UserError, match=message):
            wait(lambda text: None)

    def does(work):
        depot.write(f"records/{work.key}", spool.as_json(Record("reference", work.key, "r")))
        return Done("w", 1.0, 0.0, 0, 0)

    monkeypatch.setattr(tasks.queue, "perform", does)
    wait = publish(depot, 0, work)
    thread = threading.Thread(target=Worker(depot).serve, args=(0.0, lambda text: None))
    thread.start()
    assert wait(lambda text: None) == Done("w", 1.0, 0.0, 0, 0)
    thread.join()


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        (Runner("dasc"), r"--runner: allowed: local, dask, .*did you mean 'dask'"),
        (Runner("queue", address="tcp://x:1"), "--address tcp://x:1: runner 'queue' has none"),
        (Runner("dask", workers=0), "--workers 0 is not allowed"),
    ],
)
def test_runners_that_cannot_be(runner, message):
    with pytest.raises(UserError, match=message):
        runner.check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_local_cluster(whole, tmp_path, store, kind):
    """As a user runs it, with no Prefect server configured: one is started for the sweep."""
    config = small_config(tmp_path, corrected)
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "sweep", str(config), "--store", str(store.path),
         "--runner", kind, "--json"],
        capture_output=True, text=True, check=False, timeout=LIMIT,
        env={**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert evidence(json.loads(done.stdout)) == evidence(whole)
    assert verify(TrackingStore(store)).findings == []


@pytest.mark.slow
def test_a_dask_cluster_at_an_address_that_loses_a_worker(whole, tmp_path, store):
    from distributed import LocalCluster
    from prefect.testing.utilities import prefect_test_harness

    from flows.sweep import run_flow

    config = small_config(tmp_path, corrected)
    with (
        prefect_test_harness(server_startup_timeout=LIMIT),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
    ):

        def kill():
            while len(list(store.spool.glob("*/cell/[!.]*/record.json"))) < 2:
                time.sleep(0.01)
            os.kill(cluster.workers[0].process.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        by = Runner("dask", cluster.scheduler_address)
        result = run_flow(str(config), str(store.path), False, runner=by)
        killer.join()
        assert by.reach() in ("1 worker(s)", "2 worker(s)")
    assert evidence(result) == evidence(whole)
    assert verify(TrackingStore(store)).findings == []
    with pytest.raises(UserError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"):
        Runner("dask", "tcp://127.0.0.1:9").reach()
