"""Tamper evidence: every single change is found and named; an untouched store is intact."""

import json
import math
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient
from tests_config import TINY

from audit import signing
from audit.ledger import read_head
from audit.reading import TrackingStore
from audit.review import Review, rollback
from audit.review import review as enter_review
from audit.store import Store
from audit.verify import verify
from flows.conduct import conduct
from flows.config import read_plan

SEED = 20261124
EDITS = 4 * 65
OURS = "(key like 'halfstep.%' or key in ('mlflow.note.content', 'mlflow.parentRunId'))"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A store with two sweeps, two approvals and a rollback, the database as it was after the first
    sweep, and the database of another store."""
    folder = tmp_path_factory.mktemp("recorded")
    path = folder / "tiny.yaml"
    config = yaml.safe_load(yaml.safe_dump(TINY))
    config["matrix"]["weights"] = {"format": ["int8", "int4"], "granularity": "per_channel"}
    config["matrix"]["activations"] = {"format": ["int8"], "calibrator": ["minmax"]}
    path.write_text(yaml.safe_dump(config))
    store = Store(folder / "mlruns")
    for number in (1, 2):
        conduct(read_plan(path), path.read_text(), store, fresh=number > 1)
        if number == 1:
            older = folder / "older.db"
            copy_database(store.database, older)
        said = Review("approve", f"Reviewer {number}", "board", "margins are kept")
        enter_review(store, "", said, None)
    rollback(store, "tiny", "Reviewer 1", "board", "complaints", None)
    other = Store(folder / "other")
    conduct(read_plan(path), path.read_text(), other)
    pristine = folder / "pristine.db"
    copy_database(store.database, pristine)
    return store, pristine, older, other.database


@pytest.fixture
def store(recorded):
    """The recorded store; whatever a test does to it is undone."""
    store, pristine, _, _ = recorded
    kept = store.path.with_name("kept")
    shutil.copytree(store.artifacts, kept, dirs_exist_ok=True)
    witness = (store.path / "ledger.jsonl").read_bytes()
    yield store
    restore_database(store, pristine)
    shutil.rmtree(store.artifacts)
    kept.rename(store.artifacts)
    (store.path / "ledger.jsonl").write_bytes(witness)


def restore_database(store, database):
    copy_database(database, store.database)


def copy_database(one, other):
    """By SQLite's own copying: open connections go on seeing the file."""
    with closing(sqlite3.connect(one)) as source, closing(sqlite3.connect(other)) as to:
        source.backup(to)


def findings(store):
    return [f"{f.where}: {f.what}" for f in verify(TrackingStore(store)).findings]


# Each edit makes one change and returns a text that a finding must hold.


def rows(database, table, where="1", columns="*"):
    return database.execute(f"select rowid, {columns} from {table} where {where}").fetchall()


def sql_values(table, column, name, where="1", *, change):
    """One random row's value is changed by SQL."""

    def edit(store, pick):
        with closing(sqlite3.connect(store.database)) as database:
            row, label, value = pick.choice(rows(database, table, where, f"{name}, {column}"))
            statement = f"update {table} set {column} = ? where rowid = ?"
            database.execute(statement, (change(value), row))
            database.commit()
        return str(label)

    return edit


def sql_delete(table, name, where="1"):
    def edit(store, pick):
        with closing(sqlite3.connect(store.database)) as database:
            row, label = pick.choice(rows(database, table, where, name))
            database.execute(f"delete from {table} where rowid = ?", (row,))
            database.commit()
        return str(label)

    return edit


def recorded_runs(database, where="1"):
    """Runs that evidence or the ledger vouches for: all of ours."""
    return [r for _, r in rows(database, "runs", where, "run_uuid")]


def sql_add_tag(store, pick):
    with closing(sqlite3.connect(store.database)) as database:
        run = pick.choice(recorded_runs(database))
        database.execute("insert into tags values ('halfstep.extra', 'x', ?)", (run,))
        database.commit()
    return "halfstep.extra"


def sql_add_metric(store, pick):
    with closing(sqlite3.connect(store.database)) as database:
        run = pick.choice(recorded_runs(database))
        database.execute("insert into latest_metrics values ('extra', 1.0, 5, 0, 0, ?)", (run,))
        database.commit()
    return "metric extra"


def sql_swap_runs(store, pick):
    """Two runs exchange their params, as if they had exchanged their names."""
    with closing(sqlite3.connect(store.database)) as database:
        held = [
            r
            for (r,) in database.execute(
                "select run_uuid from params where key = 'weights.format' and value = 'int8'"
            )
        ]
        other = [
            r
            for (r,) in database.execute(
                "select run_uuid from params where key = 'weights.format' and value = 'int4'"
            )
        ]
        one, two = pick.choice(held), pick.choice(other)
        for run, to in ((one, "x"), (two, one), ("x", two)):
            database.execute("update params set run_uuid = ? where run_uuid = ?", (to, run))
        database.commit()
    return "weights.format"


def files_of(store, pick, below=""):
    return pick.choice([p for p in sorted(store.artifacts.rglob(f"{below}*")) if p.is_file()])


def named(path):
    """What a finding calls a file."""
    return path.name


def flip_byte(store, pick):
    path = files_of(store, pick)
    data = bytearray(path.read_bytes())
    place = pick.randrange(len(data))
    data[place] ^= 1 << pick.randrange(8)
    path.write_bytes(data)
    return named(path)


def truncate(store, pick):
    path = files_of(store, pick)
    path.write_bytes(path.read_bytes()[:-1])
    return named(path)


def remove_file(store, pick):
    path = files_of(store, pick)
    path.unlink()
    return named(path)


def rename_file(store, pick):
    path = files_of(store, pick)
    path.rename(path.with_name("renamed.bin"))
    return named(path)


def add_file(store, pick):
    path = files_of(store, pick)
    path.with_name("planted.txt").write_text("x")
    return "planted.txt"


def swap_files(store, pick):
    """The same artifact of two runs, with different contents."""
    found = sorted(store.artifacts.glob("tiny/*/artifacts/certificate.csv"))
    one = pick.choice(found)
    two = next(p for p in found if p.read_bytes() != one.read_bytes())
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    return "certificate.csv"


def with_client(act):
    def edit(store, pick):
        client = MlflowClient(store.tracking_uri)
        experiments = [e.experiment_id for e in client.search_experiments()]
        runs = client.search_runs(experiments, "tags.`halfstep.kind` != ''", max_results=1000)
        return act(client, pick.choice(sorted(runs, key=lambda r: r.info.run_id)), pick)

    return edit


def client_set_tag(client, run, pick):
    tag = pick.choice([t for t in sorted(run.data.tags) if t.startswith("halfstep.")])
    client.set_tag(run.info.run_id, tag, "altered")
    return tag


def client_delete_tag(client, run, pick):
    tag = pick.choice([t for t in sorted(run.data.tags) if t.startswith("halfstep.")])
    client.delete_tag(run.info.run_id, tag)
    return tag


def client_note(client, run, pick):
    client.set_tag(run.info.run_id, "mlflow.note.content", "# ACCEPT")
    return "mlflow.note.content"


def client_metric(client, run, pick):
    name = pick.choice([*sorted(run.data.metrics), "accuracy"])
    client.log_metric(run.info.run_id, name, 0.999, step=pick.randrange(3))
    return name


def client_param(client, run, pick):
    client.log_param(run.info.run_id, "planted", "x")
    return "planted"


def client_delete_run(client, run, pick):
    client.delete_run(run.info.run_id)
    return run.info.run_id


def client_artifact(client, run, pick):
    client.log_text(run.info.run_id, "x", "planted.txt")
    return "planted.txt"


def client_status(client, run, pick):
    client.set_terminated(
        run.info.run_id, "FAILED" if run.info.status == "FINISHED" else "FINISHED"
    )
    return run.info.run_id


def client_rename(client, run, pick):
    client.update_run(run.info.run_id, name="renamed")
    return run.info.run_id


def client_add_child(client, run, pick):
    experiment = client.get_experiment_by_name("tiny").experiment_id
    sweep = pick.choice(client.search_runs([experiment], "tags.`halfstep.kind` = 'sweep'"))
    tags = {"mlflow.parentRunId": sweep.info.run_id, "halfstep.kind": "cell"}
    return client.create_run(experiment, tags=tags).info.run_id


def client_forged_sweep(client, run, pick):
    experiment = client.get_experiment_by_name("tiny").experiment_id
    tags = {"halfstep.kind": "sweep", "halfstep.sweep_id": "forged-1", "halfstep.verdict": "accept"}
    made = client.create_run(experiment, tags=tags)
    client.set_terminated(made.info.run_id)
    return made.info.run_id


def client_alias(client, run, pick):
    alias = pick.choice(["candidate", "champion", "previous"])
    now = client.get_registered_model("tiny").aliases.get(alias)
    client.set_registered_model_alias("tiny", alias, "2" if str(now) != "2" else "1")
    return alias


def client_no_alias(client, run, pick):
    client.delete_registered_model_alias("tiny", "champion")
    return "champion"


def client_version_tag(client, run, pick):
    client.set_model_version_tag("tiny", pick.choice("12"), "halfstep.verdict", "altered")
    return "halfstep.verdict"


def client_version_text(client, run, pick):
    number = pick.choice("12")
    client.update_model_version("tiny", number, "fine")
    return f"model tiny version {number}"


def client_delete_version(client, run, pick):
    number = pick.choice("12")
    client.delete_model_version("tiny", number)
    return f"model tiny version {number}"


def client_experiment_note(client, run, pick):
    name = pick.choice(["tiny", "halfstep ledger"])
    experiment = client.get_experiment_by_name(name)
    client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "fine")
    return f"experiment {experiment.experiment_id}"


def client_head(client, run, pick):
    experiment = client.get_experiment_by_name("halfstep ledger")
    head = json.loads(experiment.tags["halfstep.head"])
    head["digests"] = [pick.choice([head["digests"][0][::-1], "0" * 64])]
    client.set_experiment_tag(experiment.experiment_id, "halfstep.head", json.dumps(head))
    return "head"


def client_delete_experiment(client, run, pick):
    experiment = client.get_experiment_by_name(pick.choice(["tiny", "halfstep ledger"]))
    client.delete_experiment(experiment.experiment_id)
    return "deleted"


def ledger_runs(store):
    client = MlflowClient(store.tracking_uri)
    experiment = client.get_experiment_by_name("halfstep ledger")
    found = client.search_runs([experiment.experiment_id])
    return client, experiment, sorted(found, key=lambda r: int(r.data.tags["halfstep.entry"]))


def remove_last_entry(store, pick):
    """With the head put back, as somebody would who knows the ledger."""
    client, experiment, runs = ledger_runs(store)
    client.delete_run(runs[-1].info.run_id)
    head = {"number": len(runs) - 1, "digests": [runs[-2].data.tags["halfstep.digest"]]}
    client.set_experiment_tag(experiment.experiment_id, "halfstep.head", json.dumps(head))
    return f"entry {len(runs)}"


def reorder_entries(store, pick):
    """Two entries exchange documents."""
    _, _, runs = ledger_runs(store)
    one, two = pick.sample(runs, 2)
    places = [
        store.artifacts / "halfstep ledger" / r.info.run_id / "artifacts/entry.json"
        for r in (one, two)
    ]
    a, b = (p.read_bytes() for p in places)
    places[0].write_bytes(b)
    places[1].write_bytes(a)
    return one.info.run_id


def renumber_entry(store, pick):
    """An entry's document is rewritten, well-formed, with another number."""
    from audit.ledger import Entry

    _, _, runs = ledger_runs(store)
    run = pick.choice(runs)
    path = store.artifacts / "halfstep ledger" / run.info.run_id / "artifacts/entry.json"
    body = json.loads(path.read_bytes())
    body["number"] += pick.choice([1, 7])
    path.write_bytes(Entry(body).data)
    return run.info.run_id


def number(value):
    return math.nextafter(value, math.inf) if isinstance(value, float) else value + 1


def text(value):
    return f"{value}~"


EVERY = [
    sql_values("params", "value", "key", change=text),
    sql_values("params", "key", "key", change=text),
    sql_delete("params", "key"),
    sql_values("latest_metrics", "value", "key", change=number),
    sql_values("latest_metrics", "timestamp", "key", change=number),
    sql_values("latest_metrics", "step", "key", change=number),
    sql_delete("latest_metrics", "key"),
    sql_values("metrics", "value", "key", change=number),
    sql_values("metrics", "timestamp", "key", change=number),
    sql_values("metrics", "step", "key", change=number),
    sql_delete("metrics", "key"),
    sql_values("tags", "value", "key", OURS, change=text),
    sql_values("tags", "key", "key", OURS, change=text),
    sql_delete("tags", "key", OURS),
    sql_add_tag,
    sql_add_metric,
    sql_swap_runs,
    sql_values("runs", "name", "run_uuid", change=text),
    sql_values("runs", "status", "run_uuid", change=lambda v: "FAILED"),
    sql_values("runs", "lifecycle_stage", "run_uuid", change=lambda v: "deleted"),
    sql_values("runs", "start_time", "run_uuid", change=number),
    sql_values("runs", "end_time", "run_uuid", change=number),
    sql_values("runs", "artifact_uri", "run_uuid", change=text),
    sql_delete("runs", "run_uuid"),
    sql_values("experiment_tags", "value", "experiment_id", OURS, change=text),
    sql_delete("experiment_tags", "experiment_id", "key = 'mlflow.note.content'"),
    sql_values("datasets", "digest", "name", change=text),
    sql_values("datasets", "dataset_source", "name", change=text),
    sql_values("datasets", "dataset_profile", "name", change=text),
    sql_values("input_tags", "value", "'dataset'", change=text),
    sql_delete("inputs", "'dataset'", "source_type = 'DATASET'"),
    sql_values("registered_model_aliases", "version", "alias", change=lambda v: 3 - v),
    sql_values("registered_model_aliases", "alias", "alias", change=text),
    sql_delete("registered_model_aliases", "alias"),
    sql_values("model_versions", "description", "'version ' || version", change=text),
    sql_values("model_versions", "run_id", "'version ' || version", change=lambda v: "0" * 32),
    sql_values("model_versions", "source", "'version ' || version", change=text),
    sql_values("model_version_tags", "value", "key", change=text),
    sql_delete("model_version_tags", "key"),
    flip_byte, truncate, remove_file, rename_file, add_file, swap_files,
    *map(with_client, (
        client_set_tag, client_delete_tag, client_note, client_metric, client_param,
        client_delete_run, client_artifact, client_status, client_rename, client_add_child,
        client_forged_sweep, client_alias, client_no_alias, client_version_tag,
        client_version_text, client_delete_version, client_experiment_note, client_head,
        client_delete_experiment,
    )),
    remove_last_entry, reorder_entries, renumber_entry,
]  # fmt: skip


def test_an_untouched_store_is_intact(store):
    report = verify(TrackingStore(store))
    assert report.findings == []
    assert report.notes == []
    assert (report.entries, report.runs) == (5, 2 * 7)
    assert report.items > 500


@pytest.mark.slow
def test_every_single_change_is_found_and_named(recorded):
    store, pristine, _, _ = recorded
    pick = random.Random(SEED)
    kept = store.path.with_name("kept-artifacts")
    shutil.copytree(store.artifacts, kept)
    missed = []
    for number_ in range(EDITS):
        edit = EVERY[number_ % len(EVERY)]
        label = edit(store, pick)
        found = findings(store)
        if not any(label in text for text in found):
            missed.append((number_, getattr(edit, "__qualname__", edit), label, found[:3]))
        restore_database(store, pristine)
        if not same_files(store.artifacts, kept):
            shutil.rmtree(store.artifacts)
            shutil.copytree(kept, store.artifacts)
    assert missed == []
    assert findings(store) == []


def same_files(one: Path, two: Path) -> bool:
    listed = [{p.relative_to(d): p for p in d.rglob("*") if p.is_file()} for d in (one, two)]
    return listed[0].keys() == listed[1].keys() and all(
        path.read_bytes() == listed[1][name].read_bytes() for name, path in listed[0].items()
    )


@pytest.mark.parametrize("which", ["older", "other"])
def test_a_swapped_database_is_found(store, recorded, which):
    restore_database(store, recorded[2 if which == "older" else 3])
    found = findings(store)
    assert any("the database replaced by another or an older one" in text for text in found)
    assert any("the database knows no run of this folder" in text for text in found)


def test_a_rewritten_store_shows_against_a_head_or_a_trusted_signature(store, recorded, tmp_path):
    """The limit of a chain: who rewrites everything, the witness with it, leaves no trace in it."""
    head = verify(TrackingStore(store)).head
    restore_database(store, recorded[2])
    names = {r.info.run_id for r in MlflowClient(store.tracking_uri).search_runs(["1", "2"])}
    for folder in store.artifacts.glob("*/*"):
        if folder.name != "models" and folder.name not in names:
            shutil.rmtree(folder)
    lines = (store.path / "ledger.jsonl").read_text().splitlines()
    (store.path / "ledger.jsonl").write_text(lines[0] + "\n")
    assert findings(store) == []
    report = verify(TrackingStore(store), known_heads=[read_head(head)])
    assert "is not in this ledger" in report.findings[0].what
    public = signing.make_key(tmp_path / "key", None)
    report = verify(TrackingStore(store), trusted=signing.trusted_keys([public]))
    assert "no trusted signature covers entry 1" in report.findings[0].what


def test_without_the_spool_everything_still_verifies(store):
    spool = store.spool.rename(store.path / "away")
    assert findings(store) == []
    spool.rename(store.spool)


def test_a_moved_store_verifies(recorded, tmp_path):
    moved = Store(tmp_path / "elsewhere")
    shutil.copytree(recorded[0].path, moved.path)
    assert findings(moved) == []


def test_one_sweep_alone(store):
    client, _, runs = ledger_runs(store)
    first, second = (r.data.tags["halfstep.sweep_id"] for r in (runs[0], runs[2]))
    experiment = client.get_experiment_by_name("tiny").experiment_id
    run = {
        r.data.tags["halfstep.sweep_id"]: r.info.run_id
        for r in client.search_runs([experiment], "tags.`halfstep.kind` = 'sweep'")
    }
    client.log_param(run[first], "planted", "x")
    assert verify(TrackingStore(store), run[second]).findings == []
    assert len(verify(TrackingStore(store), run[first]).findings) == 1


def test_a_damaged_witness_is_a_finding(store):
    with (store.path / "ledger.jsonl").open("a") as file:
        file.write("{}\n")
    assert any("ledger.jsonl holds a line" in text for text in findings(store))


def test_without_a_witness_a_note_says_what_is_lost(store):
    (store.path / "ledger.jsonl").unlink()
    report = verify(TrackingStore(store))
    assert report.findings == []
    assert "no witness" in report.notes[0]


def test_a_database_that_is_gone_is_not_an_empty_store(recorded, tmp_path):
    from flows.options import existing
    from halfstep.errors import Tampered

    shutil.copytree(recorded[0].path, tmp_path / "mlruns")
    (tmp_path / "mlruns" / "mlflow.db").unlink()
    with pytest.raises(Tampered, match=r"is gone, but ledger\.jsonl names what was recorded"):
        existing(tmp_path / "mlruns")
