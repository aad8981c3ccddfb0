"""Backup and retention: a copy that verifies, and nothing gone that a decision still needs."""

import os
import shutil
from datetime import date, timedelta

import pytest
from recorded import small_sweep

from audit.backup import backup
from audit.issuer import Issuer
from audit.lookup import find
from audit.reading import TrackingStore
from audit.retention import clear_spool, finish_retiring, retire, spool_to_clear, standing
from audit.review import Review, review
from audit.store import Store
from audit.trail import connect
from audit.verify import verify
from halfstep.errors import UserError

SOMEBODY = Issuer("Somebody", None)
LATER = date.today() + timedelta(days=400)


def intact(store):
    report = verify(TrackingStore(store))
    assert report.findings == []
    return report


def test_a_backup_is_a_store(store, tmp_path):
    result = small_sweep(tmp_path, store)
    made = backup(store, tmp_path / "copy")
    assert made["findings"] == []
    assert made["bytes"] > 100_000
    client = connect(store)
    client.delete_run(result["cells"][0]["run_id"])
    shutil.rmtree(store.artifacts / "tiny")
    assert verify(TrackingStore(store)).findings
    shutil.rmtree(store.path)
    (tmp_path / "copy").rename(tmp_path / "restored")
    restored = Store(tmp_path / "restored")
    intact(restored)
    assert find(restored, "")["decision"] == result["decision"]
    again = small_sweep(tmp_path, restored)
    assert again["reused"]


def test_a_backup_goes_nowhere_else(store, tmp_path, monkeypatch):
    small_sweep(tmp_path, store)
    with pytest.raises(UserError, match="is there already; name a new folder"):
        backup(store, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"pg_dump.*docs/operate.md"):
        backup(store, tmp_path / "copy")


def test_the_spool_may_go_once_a_sweep_is_recorded(store, tmp_path):
    result = small_sweep(tmp_path, store)
    assert spool_to_clear(store, 1, os.stat(store.database).st_mtime) == {}
    found = spool_to_clear(store, 0, os.stat(store.database).st_mtime + 10)
    assert list(found) == [result["sweep_id"]]
    clear_spool(store, list(found))
    intact(store)
    assert small_sweep(tmp_path, store)["reused"], "the result is still found"
    assert spool_to_clear(store, 0, os.stat(store.database).st_mtime + 10) == {}


def test_only_what_no_decision_needs_is_retired(store, tmp_path):
    first = small_sweep(tmp_path, store, fresh=True)
    second = small_sweep(tmp_path, store, fresh=True)
    third = small_sweep(tmp_path, store, fresh=True)
    said = Review("approve", "Jane", "Head", "good", (), {}, None)
    review(store, second["sweep_id"], said, None)
    held = {one.sweep_id: one for one in standing(store, 0, LATER)}
    assert held[first["sweep_id"]].reasons == ()
    assert "champion of model tiny" in held[second["sweep_id"]].reasons
    newest = held[third["sweep_id"]].reasons
    assert "the newest decision of tiny" in newest
    assert any("younger" in r for r in standing(store, 30, date.today())[0].reasons)
    signed = {one.sweep_id: one.reasons for one in standing(store, 0, date.today())}
    assert any(r.startswith("signed off until") for r in signed[second["sweep_id"]])

    before = intact(store).runs
    entry = retire(store, held[first["sweep_id"]], "two years old", SOMEBODY)
    assert set(entry.body["what"]["runs"]) == set(held[first["sweep_id"]].runs)
    report = intact(store)
    assert report.runs == before - len(held[first["sweep_id"]].runs)
    assert any("were retired; the decision stays" in note for note in report.notes)
    assert find(store, first["sweep_id"])["decision"] == first["decision"]
    for run_id in held[first["sweep_id"]].runs:
        assert not list((store.artifacts / "tiny" / run_id).rglob("*.parquet"))
    assert first["sweep_id"] not in {one.sweep_id for one in standing(store, 0, LATER)}
    # What was not retired is still missed.
    connect(store).delete_run(second["cells"][0]["run_id"])
    assert verify(TrackingStore(store)).findings


def test_killed_between_the_entry_and_the_deletion(store, tmp_path, monkeypatch):
    from audit import retention

    small_sweep(tmp_path, store, fresh=True)
    small_sweep(tmp_path, store, fresh=True)
    (old, _) = standing(store, 0, LATER)

    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention, "delete_retired", dies)
        with pytest.raises(KeyboardInterrupt):
            retire(store, old, "old", SOMEBODY)
    intact(store)
    finish_retiring(store)
    intact(store)
    client = connect(store)
    assert {client.get_run(r).info.lifecycle_stage for r in old.runs} == {"deleted"}


def test_the_commands(store, tmp_path, capsys):
    from flows.cli import app

    small_sweep(tmp_path, store, fresh=True)
    small_sweep(tmp_path, store, fresh=True)

    def run(*arguments):
        app([*arguments, "--store", str(store.path)], standalone_mode=False)
        return capsys.readouterr().out

    shown = run("prune", "--older-than", "0", "--runs")
    assert "nothing was changed; --apply does it" in shown
    assert "the newest decision of tiny" in shown
    with pytest.raises(UserError, match="needs --comment"):
        run("prune", "--older-than", "0", "--runs", "--apply")
    assert "may go" not in run("prune", "--older-than", "0", "--apply", "--comment", "x").split()
    assert "to restore: use it as the store" in run("backup", str(tmp_path / "copy"))
    intact(store)
