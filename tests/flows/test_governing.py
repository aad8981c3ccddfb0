"""The commands of auditors and boards, as they are typed: options, prompts, exit codes, JSON."""

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from recorded import small_sweep
from typer.testing import CliRunner
from waiting import LIMIT

from audit.issuer import Issuer
from audit.store import Store
from flows.cli import app
from halfstep.errors import Tampered, UserError

JANE = ["--name", "Jane Doe", "--role", "Head of ML", "--comment", "fine"]


@pytest.fixture
def swept(tmp_path):
    store = Store(tmp_path / "mlruns")
    return store, small_sweep(tmp_path, store, issuer=Issuer("Ada Author"))["sweep_id"]


def run(store, *arguments):
    return CliRunner().invoke(app, [*arguments, "--store", str(store.path)])


def test_from_sweep_to_pack(swept, tmp_path):
    store, sweep = swept
    shown = run(store, "review", sweep)
    assert "declared author Ada Author" in shown.output
    assert "sign off with: halfstep review" in shown.output
    done = run(store, "review", sweep, "--approve", *JANE, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["sets"]["aliases"] == {
        "tiny": {"champion": "1", "candidate": None}
    }
    listed = run(store, "list")
    assert "approved by Jane Doe" in listed.output
    assert "reviewed: approved by Jane Doe" in run(store, "review", sweep).output
    head = json.loads(run(store, "verify", "--json").stdout)["head"]
    heads = tmp_path / "heads.txt"
    heads.write_text(f"{head}\n")
    assert run(store, "verify", sweep, "--head", str(heads)).exit_code == 0
    lost = run(store, "verify", "--head", f"9:{'0' * 64}")
    assert lost.exit_code == 4
    assert "is not in this ledger" in lost.output
    packed = run(store, "export", sweep, str(tmp_path / "pack"))
    assert packed.exit_code == 0, packed.output
    assert "mapping.md shows" in packed.output
    assert run(store, "verify", str(tmp_path / "pack")).exit_code == 0


def test_options_that_contradict_each_other(swept):
    store, sweep = swept
    for arguments, message in (
        (["--approve", "--refuse", *JANE], "exclude each other"),
        (["--approve"], "name is empty"),
        (["--approve", *JANE, "--until", "soon"], "not a day of the form"),
        (["--approve", *JANE, "--waive", "accuracy"], "not of the form"),
        (["--refuse", *JANE, "--condition", "x"], "nothing else has any"),
    ):
        done = run(store, "review", sweep, *arguments)
        assert isinstance(done.exception, UserError), done.output
        assert message in str(done.exception)


def test_a_deleted_run_ends_with_4(swept):
    from mlflow.tracking import MlflowClient

    store, sweep = swept
    client = MlflowClient(store.tracking_uri)
    runs = client.search_runs(["1"], "tags.`halfstep.kind` = 'cell'")
    client.delete_run(runs[0].info.run_id)
    done = run(store, "verify")
    assert done.exit_code == 4
    assert f"run {runs[0].info.run_id}" in done.output
    assert "TAMPERED: 1 finding(s)" in done.output
    refused = run(store, "review", sweep, "--approve", *JANE)
    assert isinstance(refused.exception, Tampered)


def test_on_a_terminal_it_asks(swept):
    store, sweep = swept
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "flows.cli", "review", sweep, "--store", str(store.path)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    answers = ["approve with conditions", "watch it", "Bob Board", "risk", "good enough"]
    shown, deadline = "", time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        if not select.select([master], [], [], 0.5)[0]:
            continue
        try:
            shown += os.read(master, 4096).decode(errors="replace")
        except OSError:
            break
        if answers and shown.rstrip().endswith(":"):
            os.write(master, f"{answers.pop(0)}\n".encode())
            shown += "\n"
    assert process.wait(LIMIT) == 0, shown
    os.close(master)
    assert answers == []
    assert "approved with conditions by Bob Board (risk)" in run(store, "list").output
