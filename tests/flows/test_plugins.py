"""What another installed package adds is found, used, recorded, and held to the rules."""

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from evaluators import EVALUATORS
from evaluators.evaluator import Evaluator
from halfstep.errors import UserError
from halfstep.plugins import Known


@pytest.fixture(scope="module")
def installed(tmp_path_factory, request):
    """The example package, copied and installed with pip into a folder of its own."""
    import shutil

    folder = tmp_path_factory.mktemp("plugin")
    source = request.config.rootpath / "docs" / "plugin-example"
    shutil.copytree(source, folder / "source")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    where = ["--target", str(folder / "site"), str(folder / "source")]
    pip = [sys.executable, "-m", "pip", "install", *options, *where]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    return folder


def halfstep(installed, *arguments):
    environ = {**os.environ, "PYTHONPATH": str(installed / "site")}
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_the_example_is_swept_and_its_code_is_part_of_the_evidence(installed, tmp_path):
    config = installed / "source" / "sine.yaml"
    done = halfstep(installed, "sweep", str(config), "--store", str(tmp_path / "s"), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tasks"][0]["evaluator"] == "within_tolerance"
    assert result["reference"]["selection"]["metrics"]["within"] > 0.95
    formats = [cell["scheme"]["weights"]["format"] for cell in result["cells"]]
    assert formats == ["int8", "octave4"]
    assert result["cells"][0]["verdict"] == "accept"
    slices = result["cells"][0]["findings"][1]["slices"]
    assert {part["slice"] for part in slices} == {"first", "second"}
    plan = json.loads(next((tmp_path / "s").rglob("plan.json")).read_text())
    assert len(plan["plugins"]) == 4
    assert all(p.startswith("halfstep-example 0.1.0 ") for p in plan["plugins"])
    again = halfstep(installed, "sweep", str(config), "--store", str(tmp_path / "s"), "--json")
    assert json.loads(again.stdout)["reused"]
    module = installed / "site" / "halfstep_example" / "format.py"
    text = module.read_text()
    try:
        module.write_text(text + "# changed\n")
        other = halfstep(installed, "sweep", str(config), "--store", str(tmp_path / "s"), "--json")
    finally:
        module.write_text(text)
    assert json.loads(other.stdout)["sweep_id"] != result["sweep_id"]


def test_without_the_package_its_names_are_unknown(installed):
    config = installed / "source" / "sine.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "plan", str(config)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "unknown format 'octave4'" in done.stderr


@pytest.fixture
def pointing(monkeypatch):
    """Entry points as some installed package might have them."""

    def point(**values):
        points = [EntryPoint(name, value, "g") for name, value in values.items()]
        monkeypatch.setattr("halfstep.plugins.entry_points", lambda group: points)
        return Known({"fidelity": EVALUATORS["fidelity"]}, "g", Evaluator)

    return point


def test_a_name_of_ours_cannot_be_taken(pointing):
    known = pointing(fidelity="os:getcwd")
    assert known["fidelity"] is EVALUATORS["fidelity"]
    assert known.origin("fidelity") is None


def test_a_plug_in_that_breaks_on_import_is_named(pointing):
    known = pointing(broken="no_such_module_anywhere:thing")
    assert "broken" in known
    with pytest.raises(UserError, match=r"plug-in 'broken' of .* cannot be loaded: ModuleNotFound"):
        known["broken"]


def test_a_plug_in_of_another_kind_is_refused(pointing):
    with pytest.raises(UserError, match=r"plug-in 'odd' .* is not of the kind that g takes"):
        pointing(odd="os:getcwd")["odd"]
    with pytest.raises(UserError, match="is not of the kind"):
        pointing(odd="pathlib:Path")["odd"]


def test_names_of_plug_ins_stand_in_messages(pointing):
    known = pointing(mine=f"{Evaluator.__module__}:Evaluator")
    assert list(known) == ["fidelity", "mine"]
    assert len(known) == 2
    assert issubclass(known["mine"], Evaluator)
