"""A sweep or review that dies while closing: no false alarm, and the next run repairs it."""

import pytest
from mlflow.tracking import MlflowClient
from recorded import small_config, small_sweep

from audit import ledger_runs, models, trail
from audit.ledger_runs import LedgerWriter
from audit.models import aliases
from audit.reading import TrackingStore
from audit.review import Review, review
from audit.verify import verify
from flows import closing
from flows.conduct import conduct
from flows.config import read_plan


class Died(BaseException):
    """Nothing catches it, as nothing catches a kill."""


JANE = {"name": "Jane Doe", "role": "Head of ML", "comment": "fine"}
STEPS = {
    "the variant is registered": (models, "register", "after"),
    "the parent is closed": (closing, "enter_decision", "before"),
    "the entry's run is made": (LedgerWriter, "_files", "before"),
    "the entry is written": (ledger_runs, "apply_settings", "before"),
    "what it says is set": (ledger_runs, "apply_settings", "after"),
    "the head is moved": (LedgerWriter, "_move_head", "after"),
    "the entry is closed": (LedgerWriter, "_close", "after"),
}


def dying(monkeypatch, step):
    """Dies at a step, once."""
    owner, name, when = STEPS[step]
    real = getattr(owner, name)

    def deadly(*arguments, **options):
        if when == "before":
            raise Died(step)
        real(*arguments, **options)
        raise Died(step)

    monkeypatch.setattr(owner, name, deadly)


def finish(tmp_path, store):
    path = small_config(tmp_path)
    return conduct(read_plan(path), path.read_text(), store)


@pytest.mark.parametrize("step", STEPS)
def test_a_sweep_that_dies_while_closing(step, tmp_path, store, monkeypatch):
    with monkeypatch.context() as patched:
        dying(patched, step)
        with pytest.raises(BaseException, match=step):
            small_sweep(tmp_path, store)
    report = verify(TrackingStore(store))
    assert report.findings == [], "an interrupted sweep is not tampering"
    ended = step == "the entry is closed"
    assert bool(report.notes) == (not ended)
    result = finish(tmp_path, store)
    assert result["decision"]["verdict"] == "accept"
    report = verify(TrackingStore(store))
    assert report.findings == []
    assert report.entries == 1
    client = MlflowClient(store.tracking_uri)
    assert len(client.search_model_versions("name = 'tiny'")) == 1
    assert aliases(client, "tiny") == {"candidate": "1"}
    assert finish(tmp_path, store)["reused"]


@pytest.mark.parametrize("step", list(STEPS)[2:])
def test_a_review_that_dies(step, tmp_path, store, monkeypatch):
    sweep = small_sweep(tmp_path, store)["sweep_id"]
    with monkeypatch.context() as patched:
        dying(patched, step)
        with pytest.raises(Died):
            review(store, sweep, Review("approve", **JANE), None)
    assert verify(TrackingStore(store)).findings == []
    if not step.endswith(("moved", "closed")):
        review(store, sweep, Review("approve", **JANE), None)
    client = MlflowClient(store.tracking_uri)
    assert aliases(client, "tiny") == {"champion": "1"}
    report = verify(TrackingStore(store))
    assert report.findings == []


def test_what_is_recorded_is_what_was_meant_not_what_the_store_says(tmp_path, store, monkeypatch):
    """A value that is altered while the sweep still runs is found too."""
    real = trail.Trail.attach

    def altered(self, run_id, name, data):
        real(self, run_id, name, data)
        if name == "sweep.json":
            self._client.log_metric(run_id, "cells_accept", 99.0)

    with monkeypatch.context() as patched:
        patched.setattr(trail.Trail, "attach", altered)
        small_sweep(tmp_path, store)
    found = verify(TrackingStore(store)).findings
    assert len(found) == 1
    assert "metric cells_accept" in found[0].what
