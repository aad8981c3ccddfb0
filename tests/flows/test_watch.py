"""Watching: each new version of a registered model is swept once, and compared with the last."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from registry import MODEL, moved, register, trained, unequal, watching_config
from waiting import LIMIT

from audit.ledger import SUCCESSION
from audit.lookup import sweeps
from audit.reading import TrackingStore
from audit.store import Store
from audit.trail import connect
from audit.verify import finished_entries, verify
from audit.versions import Cursor, Handled
from flows.launch import Launch
from flows.succession import succession
from flows.watch import Watcher
from flows.webhook import listening, refusal, signature
from halfstep.errors import UserError

SUPPORT = str(__import__("pathlib").Path(__file__).parent.parent / "support")


def look(config, store, **options):
    """One watcher's life; its events."""
    told = []
    Watcher(Launch(config, store.path), told=told.append, **options).run(0.1, once=True)
    return told


def swept(store):
    return [one["run_id"] for one in sweeps(store)["sweeps"]]


def test_each_version_is_swept_once_and_compared_with_the_one_before(store, tmp_path):
    for model in (trained(), trained()):
        register(store, model, tmp_path)
    config = watching_config(tmp_path)
    first = look(config, store)
    assert [(e["event"], e["version"]) for e in first] == [("swept", 2)], "older ones are not swept"
    assert look(config, store) == []
    assert len(swept(store)) == 1

    register(store, trained(), tmp_path)
    register(store, moved(0.001), tmp_path)
    register(store, unequal(), tmp_path)
    events = look(config, store)  # three came while the watcher was down
    assert [(e["version"], e["event"]) for e in events] == [
        (3, "stands"), (4, "stands"), (5, "regression"),
    ]  # fmt: skip
    same, other, worse = events
    assert same["same_subject"]
    assert same["sweep_id"] == first[0]["sweep_id"], "equal weights are not swept again"
    assert same["reused"] == {first[0]["sweep_id"]: 3}
    assert not other["same_subject"]
    assert other["previous_version"] == 3
    assert other["reused"] == {}
    assert worse["scheme"] == other["cell"]
    assert worse["cell"] is None
    assert "accuracy" in worse["why"]
    assert len(swept(store)) == 3
    assert look(config, store) == []

    report = verify(TrackingStore(store))
    assert report.findings == []
    entries = [e for e in finished_entries(TrackingStore(store)) if e.kind == SUCCESSION]
    assert [e.body["what"]["outcome"] for e in entries] == [
        "unknown", "stands", "stands", "regression",
    ]  # fmt: skip
    tags = connect(store).get_run(worse["run_id"]).data.tags
    assert tags["halfstep.succession"] == "regression"
    assert tags["halfstep.model_version"] == f"{MODEL}/5"


def test_all_versions_from_a_number_on(store, tmp_path):
    for model in (trained(), moved(0.001), moved(0.002)):
        register(store, model, tmp_path)
    events = look(watching_config(tmp_path), store, since=2)
    assert [e["version"] for e in events] == [2, 3]


def test_out_of_order_and_twice(store, tmp_path, monkeypatch):
    """A registry that shows versions late, or again, changes nothing."""
    from flows import watch

    numbers = [register(store, m, tmp_path) for m in (trained(), moved(0.001), moved(0.002))]
    real = watch.versions(store, MODEL)
    assert [v for v, _ in real] == numbers
    shown = [[real[0]], [real[0], real[2]], [*real, *real], real]
    config, seen = watching_config(tmp_path), []
    for listing in shown:
        monkeypatch.setattr(watch, "versions", lambda *a, listing=listing: listing)
        seen += [e["version"] for e in look(config, store)]
    assert seen == [1, 3, 2]
    assert len(swept(store)) == 3


def test_killed_between_the_sweep_and_the_cursor(store, tmp_path, monkeypatch):
    register(store, trained(), tmp_path)
    config = watching_config(tmp_path)

    def die(self, one):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cursor, "add", die)
        with pytest.raises(KeyboardInterrupt):
            look(config, store)
    (event,) = look(config, store)
    assert event["version"] == 1
    assert len(swept(store)) == 1
    entries = [e for e in finished_entries(TrackingStore(store)) if e.kind == SUCCESSION]
    assert len(entries) == 1


def test_a_version_that_cannot_be_swept_is_named_and_the_others_go_on(store, tmp_path):
    import subjects

    register(store, trained(), tmp_path)
    config = watching_config(tmp_path)
    look(config, store)
    register(store, subjects.attentive(), tmp_path)
    register(store, moved(0.001), tmp_path)
    events = look(config, store)
    assert [(e["version"], e["event"]) for e in events] == [
        (2, "failed"), (3, "stands"), (2, "failed"), (2, "failed"),
    ]  # fmt: skip
    assert "does not fit subjects:model" in events[0]["reason"]
    assert [e["event"] for e in look(config, store)] == ["failed"] * 3, "tried at every start"


def test_variants_are_no_versions(store, tmp_path):
    register(store, trained(), tmp_path)
    register(store, trained(), tmp_path, "parts-int8")
    config = watching_config(tmp_path, lambda c: c.update(name="other"))
    (event,) = look(config, store)
    again = watching_config(
        tmp_path,
        lambda c: (c.update(name="third"), c["subject"].update(uri="models:/other/1")),
    )
    assert event["cell"] is not None, "a variant was registered as other/1"
    assert look(again, store) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(subject={"source": "small_cnn"}),
            "subject is .*small_cnn",
        ),
        (lambda c: c["subject"].update(uri="runs:/abc/weights"), "subject is .*runs:/abc"),
        (lambda c: c.update(name=MODEL), "the variants that sweeps register would be its next"),
    ],
)
def test_what_cannot_be_watched(store, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Watcher(Launch(watching_config(tmp_path, change), store.path))


def test_an_unknown_model_and_a_second_watcher(store, tmp_path):
    register(store, trained(), tmp_path, "another")
    config = watching_config(tmp_path)
    with pytest.raises(UserError, match=f"Registered Model with name={MODEL} not found"):
        look(config, store)
    one, two = (Watcher(Launch(config, store.path)) for _ in range(2))
    with one.cursor.alone(), pytest.raises(UserError, match="another watcher of 'parts-int8'"):
        two.run(0.1, once=True)


def test_a_damaged_cursor(tmp_path):
    path = tmp_path / "c.jsonl"
    cursor = Cursor(path)
    cursor.add(Handled(1, 10, "swept"))
    path.write_bytes(path.read_bytes() + b'{"version": 2, "cre')
    again = Cursor(path)
    assert list(again.handled) == [(1, 10)]
    again.add(Handled(2, 20, "swept"))
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: not a line of a watcher"):
        Cursor(path)


def result(cell, verdict="accept", schemes=None, protocol="p", confirmation=()):
    return {
        "decision": {"cell": cell, "verdict": verdict, "summary": "so it is"},
        "tasks": [{"name": "t", "protocol_digest": protocol}],
        "schemes": [{"name": n, "verdict": v} for n, v in (schemes or {}).items()],
        "cells": [{"name": n, "verdict": v, "reasons": [f"{n} {v}"]}
                  for n, v in (schemes or {}).items()],
        "confirmation": [{"name": name} for name in confirmation],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("previous", "found", "outcome"),
    [
        (None, result("a"), "unknown"),
        (result(None), result("a"), "unknown"),
        (result("a"), result("a", protocol="q", schemes={"a": "accept"}), "unknown"),
        (result("a"), result("b", schemes={"b": "accept"}), "unknown"),
        (result("a"), result("a", schemes={"a": "accept"}), "stands"),
        (result("a"), result("b", schemes={"a": "accept", "b": "accept"}), "stands"),
        (result("a"), result("b", schemes={"a": "inconclusive", "b": "accept"}), "undecided"),
        (result("a"), result(None, "reject", {"a": "reject"}), "regression"),
        (result("a"), result(None, "reject", {"a": "accept"}, confirmation=["a"]), "regression"),
        (result("a"), result(None, "inconclusive", {"a": "accept"}, confirmation=["a"]),
         "undecided"),
    ],
)  # fmt: skip
def test_does_the_scheme_still_stand(previous, found, outcome):
    told = succession(previous, found)
    assert told["outcome"] == outcome
    assert told["why"]


def post(where, payload, headers):
    request = urllib.request.Request(f"http://{where[0]}:{where[1]}/", payload, headers)
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_message_wakes_only_with_its_signature():
    payload = json.dumps({"entity": "model_version", "action": "created",
                          "data": {"name": MODEL, "version": "1"}}).encode()  # fmt: skip
    other = payload.replace(MODEL.encode(), b"other")

    def signed(data, secret="secret", age=0.0):
        stamp = str(int(time.time() - age))
        return {"X-MLflow-Delivery-Id": "d", "X-MLflow-Timestamp": stamp,
                "X-MLflow-Signature": signature(secret, "d", stamp, data)}  # fmt: skip

    woken = []
    with listening("127.0.0.1:0", "secret", MODEL, lambda: woken.append(1)) as where:
        assert post(where, payload, {}) == 401
        assert post(where, payload, signed(payload, "wrong")) == 401
        assert post(where, other, signed(payload)) == 401
        assert post(where, payload, signed(payload, age=400)) == 400
        assert post(where, b"x" * 70_000, signed(payload)) == 413
        for length in ("-1", "all", "1e3"):
            assert post(where, payload, {**signed(payload), "Content-Length": length}) == 411
        assert woken == []
        assert post(where, other, signed(other)) == 200
        assert woken == [], "about another model"
        assert post(where, payload, signed(payload)) == 200
        assert woken == [1]


def test_the_signature_is_mlflows_own():
    from mlflow.webhooks.delivery import _generate_hmac_signature

    mine = signature("s", "id", "17", b'{"a": 1}')
    assert mine == _generate_hmac_signature("s", "id", "17", '{"a": 1}')
    headers = {"X-MLflow-Signature": mine, "X-MLflow-Delivery-Id": "id", "X-MLflow-Timestamp": "17"}
    assert refusal("s", headers, b'{"a": 1}', 18.0) is None


def test_listening_needs_a_secret_and_a_free_address(store, tmp_path, monkeypatch):
    from flows.watch import receiving

    watcher = Watcher(Launch(watching_config(tmp_path), store.path))
    monkeypatch.delenv("HALFSTEP_WEBHOOK_SECRET", raising=False)
    with pytest.raises(UserError, match="--listen needs HALFSTEP_WEBHOOK_SECRET"):
        receiving(watcher, "127.0.0.1:0", "").__enter__()
    with pytest.raises(UserError, match="--announce needs --listen"):
        receiving(watcher, "", "https://x").__enter__()
    for wrong in ("8080x", "127.0.0.1:99999"):
        with pytest.raises(UserError, match="--listen"):
            listening(wrong, "s", MODEL, lambda: None).__enter__()


def test_the_command_goes_on_until_it_is_told_to_stop(store, tmp_path):
    register(store, trained(), tmp_path)
    config = watching_config(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "watch", str(config), "--store", str(store.path),
         "--interval", "0.2", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": SUPPORT},
    )  # fmt: skip
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    first = json.loads(process.stdout.readline())
    assert (first["event"], first["version"]) == ("swept", 1)
    register(store, moved(0.001), tmp_path)
    second = json.loads(process.stdout.readline())
    assert (second["event"], second["version"]) == ("stands", 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT)
    timer.cancel()
    assert process.returncode == 143, err
    assert Store(store.path).path == store.path
