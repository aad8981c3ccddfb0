"""Resume: kill -9 at any moment, then the same command; nothing lost, nothing twice."""

import json
import os
import signal
from collections import Counter

import pytest
from forked import Forked
from mlflow.tracking import MlflowClient
from waiting import until

from audit.reading import TrackingStore
from audit.verify import verify


def start(path, store):
    return Forked(["sweep", path, "--store", store.path, "--json"])


def finish(path, store):
    process = start(path, store)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out)


def kill_when(process, reached):
    """SIGKILL as soon as a condition holds; fails where the process ends before it."""
    until(reached, process, pause=0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def evidence(result):
    """What must not depend on how often a sweep was killed."""
    return (
        result["decision"],
        result["subject_digest"],
        [(c["name"], c["verdict"], c["outcomes_digest"], c["metrics"]) for c in result["cells"]],
    )


def run_counts(store):
    client = MlflowClient(store.tracking_uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`halfstep.kind` != ''", max_results=1000)
    assert {r.info.status for r in runs} == {"FINISHED"}
    names = Counter(r.data.tags["halfstep.record"] for r in runs)
    assert set(names.values()) == {1}, "a record was projected twice"
    return Counter(r.data.tags["halfstep.kind"] for r in runs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The evidence of the same sweep, never interrupted."""
    import yaml
    from tests_config import TINY

    from audit.store import Store

    folder = tmp_path_factory.mktemp("whole")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    store = Store(folder / "mlruns")
    result = finish(path, store)
    return evidence(result), run_counts(store), len(result["cells"])


def records(store, kind):
    """Committed records; what is still being written lies in folders that start with a dot."""
    return list(store.spool.glob(f"*/{kind}/[!.]*/record.json"))


def committed(store, kind, count=1):
    return lambda: len(records(store, kind)) >= count


POINTS = {
    "before anything": lambda s: s.path.exists,
    "sweep opened": lambda s: committed(s, "sweep"),
    "database half made": lambda s: lambda: any(s.path.glob(".mlflow.db.making-*")),
    "reference done": lambda s: committed(s, "reference"),
    "calibrated": lambda s: committed(s, "calibration"),
    "first cell": lambda s: committed(s, "cell"),
    "half the cells": lambda s: committed(s, "cell", 8),
    "confirmed": lambda s: committed(s, "confirmation"),
    "decided": lambda s: committed(s, "decision"),
    "variant registered": lambda s: lambda: any(s.artifacts.glob("tiny/models/*")),
    "entered in the ledger": lambda s: (s.path / "ledger.jsonl").exists,
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_sweep_goes_on_where_it_stopped(point, tiny, store, whole):
    expected, counts, cells = whole
    path = tiny()
    kill_when(start(path, store), POINTS[point](store))
    kept = len(records(store, "cell"))
    result = finish(path, store)
    assert evidence(result) == expected
    if not result["reused"]:  # killed after all was done
        assert result["cells_reused"] == kept
    assert run_counts(store) == counts
    assert verify(TrackingStore(store)).findings == []
    again = finish(path, store)
    assert again["reused"]
    assert len(records(store, "cell")) == cells


def test_killed_again_and_again(tiny, store, whole):
    expected, counts, _ = whole
    path = tiny()
    for cells in (1, 3, 6, 11):
        kill_when(start(path, store), committed(store, "cell", cells))
    assert evidence(finish(path, store)) == expected
    assert run_counts(store) == counts


def test_two_at_once_on_one_store(tiny, store):
    path = tiny()
    first = start(path, store)
    until((store.path / ".lock-holder").exists, first, pause=0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = start(path, store)
        out, err = second.communicate()
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2
    assert out == ""
    assert "is in use by sweep of 'tiny' (process" in err.splitlines()[-1]
    first.communicate()
    assert first.returncode == 0
