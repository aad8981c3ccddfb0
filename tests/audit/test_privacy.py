"""Canaries: secrets, home paths, the host's name and foreign variables must not reach the trail."""

import getpass
import json
import os
import socket
import subprocess
import sys
import zlib

import pytest
import yaml
from tests_config import TINY

from audit.environment import ALLOWED_VARIABLES, private

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "canary-aws-4f1c",
    "HF_TOKEN": "canary-hf-77aa",
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-0b2e",
    "PREFECT_API_KEY": "canary-prefect-91d3",
    "HALFSTEP_SIGNING_PASSWORD": "canary-signing-c5f0",
    "MY_OWN_VARIABLE": "canary-variable-d7e2",
}
TOKEN = "canary-git-token-5a5a"
HOME = "canary-home-b88b"


@pytest.fixture(scope="module")
def trail(tmp_path_factory):
    """What a sweep, a review and a pack leave of a user whose every secret is a canary."""
    root = tmp_path_factory.mktemp("privacy")
    project = root / HOME / "project"
    project.mkdir(parents=True)
    for pool in SHIFTS:
        (project / f"{pool}.csv").write_text("\n".join(rows_of(pool)))
    config = yaml.safe_load(yaml.safe_dump(TINY))
    config["subject"] = {"source": "small_mlp", "objective": "regression", "width": 8}
    files = {pool: str(project / f"{pool}.csv") for pool in SHIFTS}
    config["tasks"][0] |= {
        "evaluator": "regression",
        "data": {"source": "datasets", "path": "csv", "files": files,
                 "values": {"columns": ["a", "b"]}, "label": "y"},
        "criteria": [{"metric": "mae", "max_increase": 100.0}],
    }  # fmt: skip
    config["matrix"] = {"weights": {"format": "int8"}, "activations": {"format": "int8"}}
    (project / "my.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | SECRETS | {
        "HOME": str(root / HOME),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "remote.origin.url",
        "GIT_CONFIG_VALUE_0": f"https://me:{TOKEN}@example.org/x.git",
    }  # fmt: skip
    environment.pop("HALFSTEP_STORE", None)

    def halfstep(*arguments):
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    key = str(project / "signing.key")
    halfstep("keygen", key)
    sweep = json.loads(
        halfstep("sweep", str(project / "my.yaml"), "--store", str(project / "mlruns"), "--key",
                 key, "--author", "Ada", "--json")
    )  # fmt: skip
    said = ("--name", "Jane", "--role", "board", "--comment", "fine")
    halfstep("review", sweep["sweep_id"], "--approve", *said)
    halfstep("export", sweep["sweep_id"], "pack")
    return root, project, sweep


SHIFTS = {"train": 0.0, "validation": 0.25, "test": 0.5}


def rows_of(pool):
    """Rows that no other pool holds."""
    shift = SHIFTS[pool]
    return [
        "a,b,y",
        *(f"{i % 17 + shift},{i % 5 / 5},{i % 17 + i % 5 + shift}" for i in range(300)),
    ]


def left(project):
    """Every file of the store and the pack, its name and its bytes."""
    for folder in (project / "mlruns", project / "pack"):
        for path in folder.rglob("*"):
            if path.is_file():
                yield path.relative_to(project), path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("canary", [*SECRETS.values(), TOKEN, HOME])
def test_no_canary_is_in_the_store_or_the_pack(trail, canary):
    _, project, _ = trail
    needles = (canary.encode(), canary.encode("utf-16-le"))
    found = [
        str(name)
        for name, data in left(project)
        if any(n in data for n in needles) or canary in str(name)
    ]
    assert found == []


@pytest.mark.slow
def test_the_hosts_name_is_not_there_and_neither_is_the_key(trail):
    _, project, _ = trail
    host = socket.gethostname().encode()
    secret = (project / "signing.key").read_bytes().splitlines()[1]
    for name, data in left(project):
        assert secret not in data, name
        if len(host) > 5 and host != getpass.getuser().encode():
            assert host not in data, name


@pytest.mark.slow
def test_what_is_there_instead(trail):
    _, project, _ = trail
    environment = json.loads(
        next(project.glob("mlruns/spool/*/sweep/*/files/environment.json")).read_text()
    )
    assert environment["provenance"]["remote"]["value"] == "https://example.org/x.git"
    assert set(environment["provenance"]["variables"]["value"]) <= set(ALLOWED_VARIABLES)
    config = next(project.glob("mlruns/spool/*/sweep/*/files/config/config.yaml")).read_text()
    assert "~/project/train.csv" in config
    assert "--author" in environment["provenance"]["arguments"]["value"]


@pytest.mark.slow
def test_what_was_recorded_without_the_home_path_can_be_reproduced(trail, monkeypatch):
    from audit.store import Store
    from flows.reproduce import reproduce

    root, project, sweep = trail
    monkeypatch.setenv("HOME", str(root / HOME))
    found = reproduce(Store(project / "mlruns"), sweep["sweep_id"])
    assert found["status"] == "identical"


def test_a_home_path_is_found_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert private("see /home/ada/x and file:///home/ada/y") == "see ~/x and file://~/y"


def test_packed_texts_hold_none_either(trail):
    """The auditors' view is compressed, so that a search for bytes would miss it."""
    import base64

    from audit.view import cells_view

    state = json.loads(cells_view(["accuracy"]))["state"].removeprefix("deflate;")
    text = zlib.decompress(base64.b64decode(state)).decode()
    assert HOME not in text
    assert "halfstep.verdict" in text
