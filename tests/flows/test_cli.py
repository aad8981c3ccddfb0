"""The command line: exit codes, streams, and messages."""

import json
import subprocess
import sys

import pytest
from forked import run as halfstep


def as_a_user_starts_it(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def rejecting(config):
    config["matrix"] = {"weights": {"format": "int2", "granularity": "per_tensor"}}


def test_json_is_the_only_thing_on_standard_output(tiny, store):
    done = halfstep("sweep", tiny(rejecting), "--store", store.path, "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["decision"]["verdict"] == "reject"
    assert "calibrating" not in done.stdout
    assert "1/1 W int2 per_tensor minmax" in done.stderr
    for command in (["list"], ["show"], ["show", result["cells"][0]["run_id"]]):
        again = halfstep(*command, "--store", store.path, "--json")
        assert again.returncode == 0, again.stderr
        json.loads(again.stdout)
        assert again.stderr == ""
    plain = halfstep("list", "--store", store.path)
    assert (
        plain.stdout.splitlines()[0] == "sweep\tname\tstarted\tverdict\tcell\tsigned off\tsubject"
    )
    shown = halfstep("show", "--store", store.path)
    assert "REJECT: No cell was accepted" in shown.stdout


def test_require_accept_exits_with_three(tiny, store):
    done = halfstep("sweep", tiny(rejecting), "--store", store.path, "--require-accept")
    assert done.returncode == 3
    assert "REJECT" in done.stdout


def test_plan_writes_nothing(tiny, tmp_path):
    path = tiny()
    before = sorted(tmp_path.rglob("*"))
    done = halfstep("plan", path)
    assert done.returncode == 0, done.stderr
    assert "16 cells, 5 weights and 5 activations to quantize" in done.stdout
    assert "nothing was written" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert len(json.loads(halfstep("plan", path, "--json").stdout)["cells"]) == 16


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_bad_input_is_one_message_and_exit_code_two(command, tiny, tmp_path):
    path = tiny(lambda c: c.update(matrx={}))
    options = ["--store", tmp_path / "mlruns"] if command == "sweep" else []
    done = halfstep(command, path, *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "unknown key 'matrx'" in done.stderr
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("command", ["list", "show", "ui"])
def test_an_empty_store_says_how_to_fill_it(command, tmp_path):
    done = halfstep(command, "--store", tmp_path / "none")
    assert done.returncode == 2
    assert "holds no recorded sweep yet" in done.stderr
    assert not (tmp_path / "none").exists()


def test_arguments_that_do_not_exist_exit_with_two():
    assert halfstep("sweep", "x.yaml", "--frsh").returncode == 2
    assert halfstep("swep").returncode == 2


def test_the_doctor_finds_nothing_wrong_here(tmp_path):
    done = halfstep("doctor", "--store", tmp_path / "mlruns", "--json")
    checks = {c["check"]: c for c in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, checks
    assert "bit-equal" in checks["torch"]["found"]


def test_the_doctor_names_a_tracking_server_that_does_not_answer(tmp_path):
    done = halfstep("doctor", "--store", tmp_path, "--json",
                    MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9")  # fmt: skip
    assert done.returncode == 2
    assert "secret" not in done.stdout + done.stderr
    found = {c["check"]: c for c in json.loads(done.stdout)["checks"]}["tracking"]
    assert found["status"] == "fail"


def test_a_port_that_is_taken_is_named(tiny, store):
    import socket

    halfstep("sweep", tiny(rejecting), "--store", store.path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = halfstep("ui", "--store", store.path, "--port", port)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr


def test_shell_completion_is_there():
    done = halfstep("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "complete" in done.stdout


def test_a_tracking_server_that_is_down_is_named_before_anything_is_written(tiny, store):
    path = tiny(rejecting)
    down = halfstep("sweep", path, "--store", store.path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert down.returncode == 2
    assert down.stderr.splitlines()[-1] == (
        "halfstep: MLFLOW_TRACKING_URI is http://127.0.0.1:9: no answer (Connection refused)"
    )
    assert "Traceback" not in down.stderr
    assert not store.path.exists()


def test_the_version_is_told():
    from importlib.metadata import version

    assert as_a_user_starts_it("--version").stdout == f"halfstep {version('halfstep')}\n"
