"""Reproduce and compare: bit for bit in the same environment; otherwise the differences, named."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from recorded import small_sweep
from typer.testing import CliRunner

from audit.artifacts import folder_of
from audit.reading import TrackingStore
from audit.store import Store
from audit.verify import verify
from flows.cli import app
from flows.compare import compare
from flows.reproduce import reproduce
from halfstep.errors import NotComparable, UserError


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    store = Store(folder / "mlruns")
    first = small_sweep(folder, store)
    second = small_sweep(folder, store, other_margin)
    early = small_sweep(folder, store, early_and_mixed)
    return store, first, second, early


def other_margin(config):
    config["tasks"][0]["criteria"][0]["max_drop"] = 0.2


def early_and_mixed(config):
    config["evaluation"] = "early"
    config["mixed_precision"] = {
        "weights": {"format": ["int2", "int8"], "granularity": "per_channel"},
        "activations": {"format": "int8"}, "budgets": [{"weight_bytes": 0.25}],
    }  # fmt: skip


def test_a_sweep_is_identical_in_the_same_environment(swept):
    store, first, _, _ = swept
    before = sorted(p for p in store.path.rglob("*") if p.is_file())
    found = reproduce(store, first["sweep_id"])
    assert found["status"] == "identical"
    assert [c for c in found["checks"] if not c["equal"]] == []
    named = {c["what"] for c in found["checks"]}
    assert {"subject", "protocol", "decision", "data of digits · selection"} <= named
    assert sum(what.endswith(": outcomes") for what in named) == 5
    assert found["implementation"] == []
    assert sorted(p for p in store.path.rglob("*") if p.is_file()) == before, "nothing is written"


@pytest.mark.parametrize("kind", ["cells", "confirmation", "reference"])
def test_one_run_is_identical_in_the_same_environment(swept, kind):
    store, first, _, _ = swept
    run = first["reference"]["confirmation"] if kind == "reference" else first[kind][-1]
    found = reproduce(store, run["run_id"])
    assert (found["status"], len(found["checks"])) == ("identical", 3)


def test_what_depends_on_the_whole_sweep_is_not_run_alone(swept):
    store, _, _, early = swept
    stopped = next((c for c in early["cells"] if c["stopped"]), None)
    assert stopped is not None, "int2 is rejected early"
    with pytest.raises(UserError, match="stopped early, which depends on the whole sweep"):
        reproduce(store, stopped["run_id"])
    assert reproduce(store, early["run_id"])["status"] == "identical"


def test_other_outcomes_are_named_with_their_metrics_and_the_decision_may_stand(swept, monkeypatch):
    store, first, _, _ = swept
    import flows.reproduce as module

    def shaken(*arguments, **options):
        result = small_again(*arguments, **options)
        cell = result["cells"][0]
        cell["outcomes_digest"], cell["metrics"] = "0" * 64, cell["metrics"] | {"accuracy": 0.5}
        return result

    small_again = module.conduct
    monkeypatch.setattr(module, "conduct", shaken)
    found = reproduce(store, first["sweep_id"])
    assert found["status"] == "stands"
    differing = {c["what"]: (c["recorded"], c["now"]) for c in found["checks"] if not c["equal"]}
    name = f"{first['cells'][0]['name']} · digits"
    assert differing[f"{name}: accuracy"] == (first["cells"][0]["metrics"]["accuracy"], 0.5)
    assert f"{name}: outcomes" in differing

    def refused(*arguments, **options):
        result = shaken(*arguments, **options)
        result["decision"] = result["decision"] | {"verdict": "reject", "cell": None}
        return result

    monkeypatch.setattr(module, "conduct", refused)
    assert reproduce(store, first["sweep_id"])["status"] == "changed"
    run = CliRunner().invoke(app, ["reproduce", first["sweep_id"], "--store", str(store.path)])
    assert run.exit_code == 6
    assert "DIFFERS: the decision does not stand" in run.output


def test_data_that_has_changed_since_is_named(tmp_path):
    """A table in a file, of which one value of the confirmation split is another today."""
    import numpy as np

    generator = np.random.default_rng(0)
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "validation", "test")}
    for name in files:
        x = generator.normal(size=(200, 3)).round(4)
        rows = [",".join(map(str, [*row, round(sum(row), 4)])) for row in x.tolist()]
        (tmp_path / f"{name}.csv").write_text("\n".join(["a,b,c,y", *rows]))

    def tables(config):
        config["subject"] = {"source": "small_mlp", "objective": "regression", "width": 8}
        config["tasks"][0] |= {
            "evaluator": "regression",
            "data": {"source": "datasets", "path": "csv", "files": files,
                     "values": {"columns": ["a", "b", "c"]}, "label": "y"},
            "criteria": [{"metric": "mae", "max_increase": 5.0}],
        }  # fmt: skip

    store = Store(tmp_path / "mlruns")
    result = small_sweep(tmp_path, store, tables)
    assert reproduce(store, result["sweep_id"])["status"] == "identical"
    path = tmp_path / "test.csv"
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, first.replace(first.split(",")[0], "0.5", 1), *rest]))
    found = reproduce(store, result["sweep_id"])
    differing = {c["what"] for c in found["checks"] if not c["equal"]}
    assert {"protocol", "data of digits · confirmation"} <= differing
    assert "data of digits · selection" not in differing
    assert "subject" not in differing


def test_the_outcome_can_be_entered_in_the_ledger(swept):
    store, first, _, _ = swept
    run = first["cells"][0]["run_id"]
    command = ["reproduce", run, "--record", "--author", "Otto", "--store", str(store.path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "reproduction" in done.output
    report = verify(TrackingStore(store))
    assert report.findings == []
    assert report.entries == 4


def test_two_cells_side_by_side(swept):
    store, first, _, _ = swept
    found = compare(store, *(cell["run_id"] for cell in first["cells"]))
    accuracy = next(row for row in found["differences"] if row["metric"] == "accuracy")
    assert accuracy["first"] == first["cells"][0]["metrics"]["accuracy"]
    assert accuracy["second"] == first["cells"][1]["metrics"]["accuracy"]
    assert accuracy["high"] < 0, "int2 is worse"
    assert found["examples"] == 500


def test_other_protocols_are_refused_with_the_fields_that_differ(swept):
    store, first, second, _ = swept
    for one, two in (
        (first["sweep_id"], second["sweep_id"]),
        (first["cells"][0]["run_id"], second["cells"][0]["run_id"]),
    ):
        with pytest.raises(NotComparable, match=r"criteria\[0\]\.max_drop: 0\.05 and 0\.2"):
            compare(store, one, two)
    with pytest.raises(NotComparable, match="evaluated on: selection and confirmation"):
        compare(store, first["cells"][0]["run_id"], first["confirmation"][0]["run_id"])
    command = ["compare", first["sweep_id"], second["sweep_id"], "--store", str(store.path)]
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert done.stdout == ""
    assert "are not comparable; their protocols differ in" in done.stderr
    with pytest.raises(UserError, match="name two of a kind"):
        compare(store, first["sweep_id"], first["cells"][0]["run_id"])


def test_two_sweeps_side_by_side(swept, tmp_path):
    store, first, _, _ = swept

    def more_cells(config):
        config["matrix"]["weights"]["format"] = ["int8", "int4"]

    other = small_sweep(tmp_path, store, more_cells)
    found = compare(store, first["sweep_id"], other["sweep_id"])
    assert [cell["name"].split()[1] for cell in found["cells"]] == ["int8"]
    assert found["only_first"] == [f"{first['cells'][1]['name']} · digits"]
    assert found["only_second"] == [f"{other['cells'][1]['name']} · digits"]
    row = found["cells"][0]["differences"][0]
    assert row["first"] == row["second"]
    assert found["references"][0]["task"] == "digits"


def test_an_address_of_the_store_leads_nowhere_else(store):
    for bad in ("halfstep:/../x", "halfstep:/a/../../x", "file:///etc", "halfstep:/%2e%2e/x"):
        with pytest.raises(ValueError, match="names no folder"):
            folder_of(bad, store.artifacts)


def test_mlflows_own_clients_follow_the_stores_addresses(swept, tmp_path):
    from mlflow.artifacts import download_artifacts

    from audit.artifacts import SERVER_STORE

    store, first, _, _ = swept
    client = MlflowClient(store.tracking_uri)
    assert client.get_run(first["run_id"]).info.artifact_uri.startswith("halfstep:/tiny/")
    path = download_artifacts(
        run_id=first["run_id"], artifact_path="decision.md", tracking_uri=store.tracking_uri,
        dst_path=str(tmp_path),
    )  # fmt: skip
    assert Path(path).read_text().startswith("# Decision: ACCEPT")
    from mlflow.server.constants import BACKEND_STORE_URI_ENV_VAR

    assert SERVER_STORE == BACKEND_STORE_URI_ENV_VAR
