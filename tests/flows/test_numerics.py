"""The numeric core through the whole sweep: transformers, corrections, overrides, and what the
trail says of the calibration data."""

import base64
import csv
import io
import json
import zlib

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from audit.heatmap import heat_map
from flows.conduct import conduct
from flows.config import read_plan
from flows.forecast import forecast
from halfstep.errors import UserError


def attentive(matrix, sites=None, scale=1.0):
    def change(config):
        config["subject"] = {"source": "factory", "target": "subjects:attentive"}
        task = config["tasks"][0]
        task["data"] = {
            "source": "factory", "target": "subjects:sequences", "arguments": {"scale": scale}
        }  # fmt: skip
        task["splits"]["calibration"] = {"from": "train"}
        config["matrix"] = matrix
        config["sites"] = sites or {}

    return change


def sweep(path, store, **options):
    return conduct(read_plan(path), path.read_text(), store, **options)


MATRIX = {
    "weights": {"format": ["int8", "mxfp4"]},
    "activations": {"format": "int8"},
    "corrections": ["none", "smoothquant + gptq + bias_correction"],
}


def table(store, run_id, name, tmp_path):
    client = MlflowClient(store.tracking_uri)
    with open(client.download_artifacts(run_id, name, str(tmp_path)), "rb") as file:
        return list(csv.DictReader(io.StringIO(file.read().decode())))


def test_a_transformer_is_swept_with_corrections_and_overrides(tiny, store, tmp_path):
    sites = {"overrides": [{"positions": ["first", "last"], "weights": {"format": "int8"}}]}
    result = sweep(tiny(attentive(MATRIX, sites)), store)
    assert [c["status"] for c in result["cells"]] == ["finished"] * 4
    cell = next(c for c in result["cells"] if "mxfp4" in c["name"] and "gptq" in c["name"])
    assert cell["coverage"]["macs"] == pytest.approx(1.0)
    coverage = {r["place"]: r for r in table(store, cell["run_id"], "coverage.csv", tmp_path)}
    assert coverage["embed"]["weights"] == coverage["head"]["weights"] == "int8 per_channel minmax"
    assert coverage["layer.self_attn.in_proj_weight"]["weights"] == "mxfp4"
    assert coverage["layer.self_attn.attention"]["activations"] == "int8 per_tensor minmax"
    assert coverage["rnn.weight_hh_l0"]["quantized"] == "True"
    assert coverage["mix"]["weights"] == "mxfp4"
    assert "one scale" in coverage["layer.add ×2"]["reason"]
    corrected = table(store, cell["run_id"], "corrections.csv", tmp_path)
    assert {row["site"] for row in corrected} >= {"embed", "mix", "rnn.weight_ih_l0"}
    for row in corrected:
        after = float(row["relative_output_error_corrected"])
        assert after <= float(row["relative_output_error_nearest"]) * 1.05
    client = MlflowClient(store.tracking_uri)
    note = client.get_run(result["run_id"]).data.tags["mlflow.note.content"]
    assert "first, last: W int8 per_channel minmax" in note
    run = client.get_run(cell["run_id"])
    assert run.data.params["corrections"] == "smoothquant + gptq + bias_correction"
    assert run.data.params["overrides"] == "first, last: W int8 per_channel minmax"
    assert run.data.metrics["bits_per_weight"] == cell["bits_per_weight"]
    again = sweep(tiny(attentive(MATRIX, sites)), store, fresh=True)
    assert again["decision"]["digest"] == result["decision"]["digest"]


def test_residual_sums_go_through_the_whole_sweep(tiny, store, tmp_path):
    def change(config):
        config["matrix"] = {
            "weights": {"format": "int8"},
            "activations": {"format": "uint8"},
            "sums": {"format": ["none", "uint8", "uint4"], "calibrator": "mse"},
        }
        config["subject"]["blocks"] = 2
        config["sites"] = {"skip": ["blocks.1.sum"]}
        config["sensitivity"] = {"examples": 32}
        config["mixed_precision"] = {
            "weights": {"format": ["int8", "int4"]}, "activations": {"format": "uint8"},
            "budgets": [{"weight_bytes": 0.2}], "examples": 32,
        }  # fmt: skip

    result = sweep(tiny(change), store)
    (mixed,) = [c for c in result["cells"] if c["name"].startswith("mixed")]
    assert "sum" not in str(mixed["scheme"])
    plain = [c for c in result["cells"] if c is not mixed]
    cells = {c["scheme"].get("sums", {}).get("format"): c for c in plain}
    assert set(cells) == {None, "uint8", "uint4"}
    shown = heat_map(result, result["tasks"][0])
    assert sum(len(row["cells"]) for row in shown["rows"]) == len(result["cells"])
    assert cells["uint8"]["name"].endswith(" · sums uint8 per_tensor mse")
    client = MlflowClient(store.tracking_uri)
    run = client.get_run(cells["uint8"]["run_id"])
    assert run.data.params["sums"] == "uint8 per_tensor mse"
    shared = client.get_experiment_by_name(result["experiment"]).tags[
        "mlflow.sharedViewState.audit"
    ]
    packed = json.loads(shared)["state"].removeprefix("deflate;")
    assert "params.`sums`" in zlib.decompress(base64.b64decode(packed)).decode()
    certified = table(store, run.info.run_id, "certificate.csv", tmp_path)
    assert {"blocks.0.sum.augend", "blocks.0.sum.addend"} <= {row["site"] for row in certified}
    rows = {}
    for sums in (None, "uint8"):
        found = table(store, cells[sums]["run_id"], "coverage.csv", tmp_path)
        rows[sums] = {row["place"]: row for row in found}
    assert rows["uint8"]["blocks.0.sum"]["activations"] == "uint8 per_tensor mse"
    assert rows["uint8"]["blocks.1.sum"]["reason"] == "skipped by pattern 'blocks.1.sum'"
    assert "leaves its terms" in rows[None]["blocks.0.sum"]["reason"]
    # Coarse sums cost what nothing else costs here.
    loss = {sums: cell["metrics"]["log_loss"] for sums, cell in cells.items()}
    assert abs(loss["uint8"] - loss[None]) < abs(loss["uint4"] - loss[None])
    again = sweep(tiny(change), store, fresh=True)
    assert again["decision"]["digest"] == result["decision"]["digest"]


def test_sums_that_a_model_does_not_have_are_refused(tiny, store):
    def change(config):
        config["subject"] = {"source": "factory", "target": "subjects:model"}
        config["tasks"][0]["data"] = {"source": "factory", "target": "subjects:data"}
        config["tasks"][0]["splits"]["calibration"] = {"from": "train"}
        config["matrix"] = {"activations": {"format": "int8"}, "sums": {"format": "int8"}}

    with pytest.raises(UserError, match=r"matrix\.sums: the model adds no two activations"):
        sweep(tiny(change), store)


def test_the_plan_shows_overrides_and_what_each_site_gets(tiny, store):
    sites = {
        "skip": ["layer.linear1"],
        "overrides": [
            {"kinds": ["recurrent"], "weights": {"format": "int8"}, "activations": "none"}
        ],
    }
    plan = forecast(read_plan(tiny(attentive(MATRIX, sites))), store)
    assert plan["overrides"] == ["kind recurrent: W int8 per_channel minmax · A fp32"]
    rows = {row["place"]: row for row in plan["coverage"]}
    assert rows["layer.linear1"]["reason"] == "skipped by pattern 'layer.linear1'"
    assert rows["rnn.weight_ih_l0"]["activations"] == "fp32"
    assert rows["embed"]["activations"] == "int8 per_tensor minmax"
    # One static pass, one for the moments of the corrections, one for the rewritten model.
    assert plan["examples_to_run"]["calibration"] == 3 * 200


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"overrides": [{"names": "hed", "weights": "none"}]}, r"'hed' matches no site.*'head'"),
        ({"overrides": [{"kinds": "conv2d", "weights": "none"}]}, r"no site is of kind 'conv2d'"),
        ({"overrides": [{"names": "*", "weights": "none", "activations": "none"}]},
         r"no site is left to quantize under"),
    ],
)  # fmt: skip
def test_overrides_that_fit_nothing_are_refused(tiny, store, sites, message):
    with pytest.raises(UserError, match=message):
        sweep(tiny(attentive(MATRIX, sites)), store)
    assert not store.path.exists()


ONE = {"weights": {"format": "int8"}, "activations": {"format": "int8"}}


def test_calibration_data_that_represents_the_task_says_so(tiny, store, tmp_path):
    result = sweep(tiny(attentive(ONE)), store)
    found = result["calibration"]
    assert found["representativeness"]["warning"] is None
    run_id = found["run_id"]
    rows = table(store, run_id, "representativeness.csv", tmp_path)
    assert {row["site"] for row in rows} >= {"embed", "layer.self_attn.attention.probabilities"}
    growth = table(store, run_id, "convergence.csv", tmp_path)
    assert [row["share"] for row in growth if row["site"] == "embed"] == [
        "0.125",
        "0.25",
        "0.5",
        "1.0",
    ]
    assert [row["examples"] for row in growth if row["site"] == "embed"] == [
        "32",
        "64",
        "128",
        "200",
    ]


def test_calibration_data_that_does_not_is_a_warning_that_names_the_worst_site(tiny, store):
    result = sweep(tiny(attentive(ONE, scale=4.0)), store)
    warning = result["calibration"]["representativeness"]["warning"]
    assert warning.startswith("calibration data does not represent selection")
    assert "outside the calibrated range" in warning
    note = (
        MlflowClient(store.tracking_uri).get_run(result["run_id"]).data.tags["mlflow.note.content"]
    )
    assert warning in note


def _calibration_run(store, result):
    client = MlflowClient(store.tracking_uri)
    key = result["calibration"]["key"]
    return client.search_runs([result["experiment_id"]], f"tags.halfstep.key = '{key}'")[
        0
    ].info.run_id


def test_the_batch_size_of_the_evaluation_moves_no_bit_of_a_range(tiny, store, tmp_path):
    found = []
    for size in (64, 7):

        def change(config, size=size):
            attentive(ONE)(config)
            config["compute"] = {"batch_size": size}

        result = sweep(tiny(change), store)
        client = MlflowClient(store.tracking_uri)
        folder = tmp_path / str(size)
        folder.mkdir()
        path = client.download_artifacts(
            result["cells"][0]["run_id"], "qparams.safetensors", str(folder)
        )
        found.append(load_file(path))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_rerunning_with_corrections_runs_nothing_and_a_wider_matrix_only_what_is_new(tiny, store):
    sweep(tiny(attentive(MATRIX)), store)
    again = sweep(tiny(attentive(MATRIX)), store)
    assert again["reused"]
    wider = MATRIX | {"corrections": [*MATRIX["corrections"], "gptq"]}
    result = sweep(tiny(attentive(wider)), store)
    assert result["cells_reused"] == 4
    assert len(result["cells"]) == 6
