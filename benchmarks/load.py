"""How a store with 1,000 sweeps of 50 cells answers.

    make bench-load            (or: python -m benchmarks.load [sweeps])

A real sweep of digits is run once; its runs are copied in the SQLite database, and its folder in
the spool, under other ids. Timed is what a command does once its libraries are imported; what a
whole process takes, start and imports included, is printed beside it. Medians of five.
"""

from __future__ import annotations

import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import yaml

from audit import lookup
from audit.recorder import Recorder
from audit.store import Store
from audit.trail import connect
from audit.versions import Cursor, Handled, versions
from flows.conduct import conduct
from flows.config import read_plan

CONFIG = Path("configs/digits.yaml")
ROUNDS = 5
MODEL = "net"


def main(sweeps: int = 1000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, config = Store(Path(folder, "mlruns")), Path(folder, "digits.yaml")
        config.write_text(_fifty_cells())
        first = conduct(read_plan(config), config.read_text(), store)
        copies = _copy(store, first["sweep_id"], sweeps - 1)
        runs = _count(store)
        print(f"{sweeps} sweeps of {len(first['cells'])} cells, {runs} runs, "
              f"{store.database.stat().st_size / 2**20:.0f} MiB of SQLite")  # fmt: skip
        some = copies[len(copies) // 2]
        cursor = Cursor(store.path / "watch" / "digits.jsonl")
        _register(store, sweeps)
        for number, created in versions(store, MODEL):
            cursor.handled[number, created] = Handled(number, created, "swept", some, "")
        acts: dict[str, tuple[Callable[[], object], list[str]]] = {
            "list": (lambda: lookup.sweeps(store, 50), ["list"]),
            "list --all": (lambda: lookup.sweeps(store), ["list", "--all"]),
            "show (newest)": (lambda: lookup.find(store, ""), ["show"]),
            "show SWEEP": (lambda: lookup.find(store, some), ["show", some]),
            "show RUN": (lambda: lookup.find(store, first["cells"][0]["run_id"]),
                         ["show", first["cells"][0]["run_id"]]),
            "watch, one look": (lambda: _look(store, cursor), []),
            "starting a sweep": (lambda: _open(store), []),
            "finding an earlier record": (lambda: _earlier(store), []),
        }  # fmt: skip
        for name, (act, command) in acts.items():
            inside = statistics.median(_timed(act) for _ in range(ROUNDS))
            whole = ""
            if command:
                seconds = statistics.median(
                    _timed(lambda c=command: _command(c, store)) for _ in range(3)
                )
                whole = f"   the command, with start and imports {seconds:.2f} s"
            print(f"{name:<28}{inside:.3f} s{whole}")


def _fifty_cells() -> str:
    config = yaml.safe_load(CONFIG.read_text())
    config["matrix"] = {
        "weights": {"format": ["int8", "int6", "int5", "int4", "int3"],
                    "granularity": ["per_tensor", "per_channel"]},
        "activations": {"format": "int8",
                        "calibrator": ["minmax", "percentile", "entropy", "mse", "percentile(99)"]},
    }  # fmt: skip
    return yaml.safe_dump(config)


def _open(store: Store) -> None:
    """What a sweep asks of the store before its first cell."""
    recorder = Recorder(store, "digits", "0" * 12 + "-1")
    recorder.previous  # noqa: B018  (waits until the store was opened)
    recorder.wait()
    recorder.close()


def _look(store: Store, cursor: Cursor) -> None:
    """What a watcher does at every interval while nothing is new."""
    found = versions(store, MODEL)
    assert all(one in cursor.handled for one in found)
    cursor.previous(len(found) + 1)


def _register(store: Store, count: int) -> None:
    """A registered model with so many versions."""
    connect(store).create_registered_model(MODEL)
    row = "(?, ?, ?, ?, 'None', 'runs:/none/weights', 'READY')"
    with closing(sqlite3.connect(store.database)) as database:
        database.executemany(
            "INSERT INTO model_versions (name, version, creation_time, last_updated_time, "
            f"current_stage, source, status) VALUES {row}",
            [(MODEL, number, 1000 + number, 1000 + number) for number in range(1, count + 1)],
        )
        database.commit()


def _earlier(store: Store) -> None:
    store.sweep("f" * 64, fresh=False).earlier("cell", "f" * 64)


def _copy(store: Store, sweep_id: str, count: int) -> list[str]:
    """Copies every run of a sweep; the ids of the copies."""
    made = [f"{number:012x}-1" for number in range(1, count + 1)]
    with closing(sqlite3.connect(store.database)) as database:
        tables = {
            table: [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            for table in ("runs", "tags", "params", "metrics", "latest_metrics")
        }
        ids = [
            row[0]
            for row in database.execute(
                "SELECT run_uuid FROM tags WHERE key = 'halfstep.sweep_id' AND value = ?",
                (sweep_id,),
            )
        ]
        kept = {
            table: database.execute(
                f"SELECT {', '.join(columns)} FROM {table} "
                f"WHERE run_uuid IN ({', '.join('?' * len(ids))})", ids
            ).fetchall()
            for table, columns in tables.items()
        }  # fmt: skip
        for number, sweep in enumerate(made, 1):
            renamed = {run: f"{number:06x}{run[6:]}" for run in ids} | {sweep_id: sweep}
            for table, columns in tables.items():
                at = columns.index("start_time") if table == "runs" else None
                rows = []
                for row in kept[table]:
                    new = [renamed.get(value, value) for value in row]
                    if at is not None:
                        new[at] -= number * 60_000
                        new[columns.index("end_time")] -= number * 60_000
                    rows.append(new)
                marks = ", ".join("?" * len(columns))
                database.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        database.commit()
    home = store.artifacts / "digits"
    for number, sweep in enumerate(made, 1):
        shutil.copytree(store.spool / sweep_id / "sweep", store.spool / sweep / "sweep")
        for run in ids:
            source = home / run / "artifacts" / "sweep.json"
            if source.exists():
                place = home / f"{number:06x}{run[6:]}" / "artifacts"
                place.mkdir(parents=True)
                shutil.copy(source, place / "sweep.json")
    return made


def _count(store: Store) -> int:
    with closing(sqlite3.connect(store.database)) as database:
        return int(database.execute("SELECT count(*) FROM runs").fetchone()[0])


def _command(arguments: list[str], store: Store) -> None:
    command = [sys.executable, "-m", "flows.cli", *arguments, "--store", str(store.path), "--json"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def _timed(act: Callable[[], object]) -> float:
    before = time.perf_counter()
    act()
    return time.perf_counter() - before


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
