"""The sweep end to end on real data: what is decided, recorded, and found again."""

import io
import json
import re
from pathlib import Path

import forked
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from audit.lookup import find, sweeps
from flows.conduct import conduct
from flows.config import read_plan
from flows.forecast import forecast
from halfstep.errors import UserError
from halfstep.sketch import Sketch


def sweep(path, store, **options):
    return conduct(read_plan(path), path.read_text(), store, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished tiny sweep: (result, store, config path)."""
    import yaml

    from audit.store import Store

    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "tiny.yaml"
    from tests_config import TINY

    path.write_text(yaml.safe_dump(TINY))
    store = Store(folder / "mlruns")
    return sweep(path, store), store, path


@pytest.fixture(scope="module")
def runs(done):
    _, store, _ = done
    client = MlflowClient(store.tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    found = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ACTIVE_ONLY)
    return client, experiment, {r.info.run_id: r for r in found}


def artifacts(client, run_id, path=None):
    found = []
    for item in client.list_artifacts(run_id, path):
        found += artifacts(client, run_id, item.path) if item.is_dir else [item.path]
    return sorted(found)


def download(client, run_id, name, folder):
    return Path(client.download_artifacts(run_id, name, str(folder))).read_bytes()


def test_the_cheapest_accepted_cell_is_confirmed(done):
    result, _, _ = done
    accepted = [c for c in result["cells"] if c["verdict"] == "accept"]
    rejected = [c for c in result["cells"] if c["verdict"] == "reject"]
    assert accepted
    assert rejected
    assert result["decision"]["verdict"] == "accept"
    chosen = next(c for c in result["cells"] if c["name"] == result["decision"]["cell"])
    assert chosen["weight_bytes"] == min(c["weight_bytes"] for c in accepted)
    assert result["confirmation"][0]["name"] == chosen["name"]
    assert result["confirmation"][0]["outcomes_digest"] != chosen["outcomes_digest"]


def test_the_result_holds_what_is_promised(done):
    result, _, _ = done
    promised = {"sweep_id", "run_id", "experiment", "subject_digest", "protocol_digest",
                "reference", "cells", "decision", "seconds"}  # fmt: skip
    assert promised <= set(result)
    cell = {"name", "run_id", "scheme", "status", "verdict", "reasons", "metrics", "weight_bytes",
            "outcomes_digest", "coverage", "certificate"}  # fmt: skip
    assert all(cell <= set(c) and c["run_id"] for c in result["cells"])
    assert {"verdict", "cell", "criteria", "digest"} <= set(result["decision"])
    assert all(c["certificate"]["holds"] for c in result["cells"])
    assert result["deterministic"]
    assert 0 <= result["seconds"]["overhead_share"] <= 1
    json.dumps(result, allow_nan=False)


def test_every_piece_is_a_finished_run_below_the_parent(done, runs):
    result, _, _ = done
    found = dict(runs[2])
    parent = found.pop(result["run_id"])
    # Besides the cells: two references, the calibration, one confirmation.
    assert len(found) == len(result["cells"]) + 4
    assert parent.info.status == "FINISHED"
    for run in found.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
    for cell in result["cells"]:
        run = found[cell["run_id"]]
        assert run.info.run_name == cell["name"]
        assert run.data.tags["halfstep.verdict"] == cell["verdict"]
        assert run.data.params["weights.format"] == cell["scheme"]["weights"]["format"]
        assert run.data.metrics["accuracy"] == cell["metrics"]["accuracy"]


def test_the_auditor_sees_the_verdict_first(done, runs):
    result, _, _ = done
    _, experiment, found = runs
    note = found[result["run_id"]].data.tags["mlflow.note.content"]
    assert note.splitlines()[0] == f"# ACCEPT: {result['decision']['cell']}"
    assert experiment.tags["mlflow.note.content"] == note
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_datasets_are_inputs_with_our_full_digest(done, runs):
    result, _, _ = done
    _, _, found = runs
    inputs = found[result["run_id"]].inputs.dataset_inputs
    tags = [{t.key: t.value for t in item.tags} for item in inputs]
    by_context = {t["mlflow.data.context"]: t for t in tags}
    assert set(by_context) == {"calibration", "selection", "confirmation"}
    for split, described in result["tasks"][0]["splits"].items():
        assert by_context[split]["halfstep.sha256"] == described["sha256"]
        assert by_context[split]["halfstep.examples"] == str(described["examples"])


def test_the_parent_holds_the_evidence(done, runs, tmp_path):
    result, _, path = done
    client, _, _ = runs
    names = artifacts(client, result["run_id"])
    assert names == sorted(
        ["cells.csv", "config/config.yaml", "config/plan.json", "config/protocol.json",
         "coverage.csv", "decision.json", "decision.md", "decision.schema.json",
             "environment.json", "evidence.json", "report.html", "subject.json", "sweep.json",
             "plots/size.png", "plots/pareto-size.png", "plots/sqnr_by_site.png",
             "plots/error_against_bound.png"]
    )  # fmt: skip
    assert download(client, result["run_id"], "config/config.yaml", tmp_path) == path.read_bytes()
    decision = json.loads(download(client, result["run_id"], "decision.json", tmp_path))
    assert decision["digest"] == result["decision"]["digest"]


def test_each_cell_holds_its_tables_and_its_outcomes(done, runs, tmp_path):
    result, _, _ = done
    client, _, _ = runs
    cell = result["cells"][0]
    assert artifacts(client, cell["run_id"]) == [
        "accumulators.csv", "arithmetic.csv", "certificate.csv", "coverage.csv", "evidence.json",
        "metrics.json", "outcomes-selection.parquet", "qparams.safetensors", "scheme.json",
    ]  # fmt: skip
    data = download(client, cell["run_id"], "outcomes-selection.parquet", tmp_path)
    table = pq.read_table(io.BytesIO(data)).to_pydict()
    assert len(table["label"]) == result["tasks"][0]["splits"]["selection"]["examples"]
    assert sum(table["correct"]) / 500 == pytest.approx(cell["metrics"]["accuracy"])
    client.download_artifacts(cell["run_id"], "qparams.safetensors", str(tmp_path))
    qparams = load_file(tmp_path / "qparams.safetensors")
    assert qparams["conv.weight.scale"].dtype == torch.float32
    assert qparams["conv.input.zero_point"].dtype == torch.int32


def test_the_sketches_are_in_the_trail(done, runs, tmp_path):
    client, _, found = runs
    run = next(r for r in found.values() if r.data.tags["halfstep.kind"] == "calibration")
    client.download_artifacts(run.info.run_id, "observations.safetensors", str(tmp_path))
    tensors = load_file(tmp_path / "observations.safetensors")
    sites = {name.rpartition("/")[0] for name in tensors}
    assert sites == {"conv", "blocks.0.conv1", "blocks.0.conv2", "blocks.0.shortcut", "head"}
    conv = Sketch.from_tensors({p: tensors[f"conv/{p}"] for p in ("bins", "counts", "range")})
    assert conv.total == 64 * 8 * 8


def test_the_report_is_one_file_without_network_and_escapes(done, runs, tmp_path):
    result, _, _ = done
    client, _, _ = runs
    page = download(client, result["run_id"], "report.html", tmp_path).decode()
    assert result["decision"]["cell"] in page
    assert page.index("ACCEPT: ") < page.index("Criteria")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") == 4


def test_markup_in_a_name_is_escaped_in_the_report(tiny, store):
    def change(config):
        config["name"] = "<script>alert(1)<"
        config["matrix"] = {"weights": {"format": "int8"}}

    result = sweep(tiny(change), store)
    page = next(store.spool.glob("*/decision/*/files/report.html")).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert result["name"] == "<script>alert(1)<"


def test_nothing_private_reaches_the_trail(tiny, store, monkeypatch):
    monkeypatch.setenv("HALFSTEP_CANARY", "canary-4711")
    monkeypatch.setenv("HOME", "/home/canary-4712")
    sweep(tiny(lambda c: c.update(matrix={"weights": {"format": "int8"}})), store)
    for path in store.path.rglob("*"):
        if path.is_file():
            assert b"canary-471" not in path.read_bytes(), path


def test_the_environment_has_a_reason_for_every_null(done):
    _, store, _ = done
    path = next(store.spool.glob("*/sweep/*/files/environment.json"))
    facts = [f for group in json.loads(path.read_text()).values() for f in group.values()]
    assert len(facts) > 25
    assert all(f["value"] is not None or f["reason"] for f in facts)


def test_a_rerun_runs_nothing_and_fresh_gives_the_same_digests(done):
    result, store, path = done
    again = sweep(path, store)
    assert again["reused"]
    assert again["run_id"] == result["run_id"]
    fresh = sweep(path, store, fresh=True)
    assert not fresh["reused"]
    assert fresh["sweep_id"] != result["sweep_id"]
    assert fresh["cells_reused"] == 0
    assert fresh["decision"]["digest"] == result["decision"]["digest"]
    ours = [c["outcomes_digest"] for c in result["cells"]]
    assert [c["outcomes_digest"] for c in fresh["cells"]] == ours


def test_a_wider_matrix_reuses_what_is_there_and_says_from_where(done, tmp_path):
    result, store, path = done
    wider = tmp_path / "wider.yaml"
    wider.write_text(path.read_text().replace("- int2", "- int2\n    - int4"))
    extended = sweep(wider, store)
    reused = [c for c in extended["cells"] if c["reused_from"]]
    assert len(reused) == extended["cells_reused"] == len(result["cells"])
    assert {c["reused_from"].rsplit("-", 1)[0] for c in reused} == {
        result["sweep_id"].rsplit("-", 1)[0]
    }
    assert len(extended["cells"]) > len(reused)


def test_another_batch_size_is_another_protocol(done, tmp_path):
    result, store, path = done
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text() + "compute: {batch_size: 50}\n")
    changed = sweep(other, store)
    assert changed["protocol_digest"] != result["protocol_digest"]
    assert changed["cells_reused"] == 0


def test_a_lost_database_is_recorded_anew_from_the_spool(tiny, store):
    path = tiny(lambda c: c.update(matrix={"weights": {"format": "int8"}}))
    first = sweep(path, store)
    for file in store.path.glob("mlflow.db*"):
        file.unlink()
    # Another process: this one has the old database open.
    again = json.loads(forked.run("sweep", path, "--store", store.path, "--json").stdout)
    assert not again["reused"]
    assert again["cells_reused"] == len(again["cells"])
    assert again["decision"]["digest"] == first["decision"]["digest"]
    shown = json.loads(forked.run("show", "--store", store.path, "--json").stdout)
    assert shown["run_id"] == again["run_id"]


def test_a_damaged_record_is_done_again(tiny, store):
    path = tiny(lambda c: c.update(matrix={"weights": {"format": "int8"}}))
    first = sweep(path, store)
    outcomes = next(store.spool.glob("*/cell/*/files/outcomes-selection.parquet"))
    outcomes.write_bytes(b"damaged")
    next(store.spool.glob("*/sweep.json")).unlink()
    again = sweep(path, store)
    assert again["cells_reused"] == 0
    assert again["decision"]["digest"] == first["decision"]["digest"]


def test_list_and_show_find_what_was_recorded(done):
    result, store, _ = done
    lines = sweeps(store)["sweeps"]
    assert result["sweep_id"] in [line["sweep_id"] for line in lines]
    shown = find(store, result["sweep_id"])
    assert shown["decision"] == result["decision"]
    assert shown["cells"] == result["cells"]
    cell = find(store, result["cells"][0]["run_id"])
    assert cell["verdict"] == result["cells"][0]["verdict"]
    with pytest.raises(UserError, match=r"no run or sweep 'zzz' is recorded; newest sweeps"):
        find(store, "zzz")


def test_the_plan_foretells_cells_sizes_and_sites(done):
    result, store, path = done
    plan = forecast(read_plan(path), store)
    assert [c["name"] for c in plan["cells"]] == [c["name"] for c in result["cells"]]
    assert [c["weight_bytes"] for c in plan["cells"]] == [
        c["weight_bytes"] for c in result["cells"]
    ]
    names = ["conv", "blocks.0.conv1", "blocks.0.conv2", "blocks.0.shortcut", "head"]
    assert [s["name"] for s in plan["sites"]["weights"]] == names
    assert [s["name"] for s in plan["sites"]["activations"]] == names
    assert plan["examples_to_run"]["cells"] == 500 * len(result["cells"])


def test_weights_alone_need_no_calibration_pass(tiny, store):
    sweep(tiny(lambda c: c.update(matrix={"weights": {"format": "int8"}})), store)
    assert not list(store.spool.glob("*/calibration"))


def test_a_matrix_that_no_cell_survives_decides_so(tiny, store):
    def change(config):
        config["matrix"] = {"weights": {"format": "int2", "granularity": "per_tensor"}}

    result = sweep(tiny(change), store)
    assert result["decision"]["verdict"] == "reject"
    assert result["decision"]["cell"] is None
    assert result["confirmation"] == []
    assert "No cell was accepted" in result["decision"]["summary"]
