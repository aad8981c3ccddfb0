"""The shipped configs run here: the quick ones whole, the long ones on less of their data."""

import pytest
import yaml

from flows.conduct import conduct
from flows.config import read_plan

pytestmark = pytest.mark.filterwarnings("ignore")


def shipped(request, tmp_path, store, name, change=lambda config: None):
    config = yaml.safe_load((request.config.rootpath / "configs" / f"{name}.yaml").read_text())
    change(config)
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return conduct(read_plan(path), path.read_text(), store)


def test_diabetes(request, tmp_path, store):
    result = shipped(request, tmp_path, store, "diabetes")
    assert 45 < result["reference"]["selection"]["metrics"]["rmse"] < 65
    assert result["decision"]["verdict"] == "accept"
    assert {c["status"] for c in result["cells"]} == {"finished"}


def test_breast_cancer_is_ranked_by_the_threshold_of_the_reference(request, tmp_path, store):
    result = shipped(request, tmp_path, store, "breast-cancer")
    metrics = result["reference"]["selection"]["metrics"]
    assert metrics["auroc"] > 0.97
    assert metrics["fpr_at_threshold"] <= 0.05
    verdicts = {c["scheme"]["weights"]["format"]: c["verdict"] for c in result["cells"]}
    assert verdicts["int8"] == "accept"


def test_minilm_on_three_tasks(request, tmp_path, store):
    def less(config):
        config["matrix"]["weights"]["format"] = ["int8"]
        for task in config["tasks"]:
            task["data"]["packages"] = ["numpy", "sklearn"]
            task["splits"] = {
                "calibration": {"from": "train", "samples": 16},
                "selection": {"from": "validation", "samples": 60},
                "confirmation": {"from": "test", "samples": 60},
            }
            for kind in ("text", "search"):
                if kind in task["data"]:
                    task["data"][kind]["max_length"] = 16

    result = shipped(request, tmp_path, store, "minilm", less)
    assert [t["name"] for t in result["tasks"]] == ["similarity", "retrieval", "near-duplicates"]
    found = [t["reference"]["selection"]["metrics"][t["headline"]] for t in result["tasks"]]
    assert found[0] > 0.4
    assert found[1] > 0.3
    assert found[2] > 0.8
    assert len(result["cells"]) == 6
    # Per token, activations at eight bits stay close; per tensor, with outliers clipped, they do
    # not.
    drift = {(c["task"], c["scheme"]["activations"]["granularity"]): c["metrics"]["drift"]
             for c in result["cells"]}  # fmt: skip
    for task in ("similarity", "retrieval", "near-duplicates"):
        assert drift[task, "per_token"] < drift[task, "per_tensor"]


def test_the_small_language_model(request, tmp_path, store):
    def less(config):
        config["subject"] |= {"epochs": 1, "width": 32, "depth": 1}
        task = config["tasks"][0]
        task["data"]["packages"] = ["numpy"]
        for split in task["splits"].values():
            split["samples"] = 60
        task["criteria"][0]["max_increase"] = 5.0

    result = shipped(request, tmp_path, store, "small-lm", less)
    metrics = result["reference"]["selection"]["metrics"]
    assert 2 < metrics["perplexity"] < 40
    assert result["tasks"][0]["cluster"] == "document"
    int8 = next(c for c in result["cells"] if c["scheme"]["weights"]["format"] == "int8")
    assert int8["verdict"] == "accept"
    assert int8["metrics"]["top1_agreement"] > 0.95


def test_fashion_mnist_on_files_of_its_format(request, tmp_path, store):
    """Digits in the place of garments: the same files, the same config, less work."""
    import struct

    import numpy as np
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.kron(bunch.images * 15, np.ones((3, 3))).astype(np.uint8)
    for stem, part in (("train", slice(0, 1300)), ("t10k", slice(1300, None))):
        for kind, array in (("images-idx3", pixels[part]), ("labels-idx1", bunch.target[part])):
            array = array.astype(np.uint8)
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{stem}-{kind}-ubyte").write_bytes(head + array.tobytes())

    def less(config):
        config["subject"] |= {"width": 8, "epochs": 8, "batch_size": 32, "threads": 1}
        config["tasks"][0]["data"] |= {"path": str(tmp_path), "validation": 400}
        config["tasks"][0]["splits"]["calibration"]["samples"] = 64

    result = shipped(request, tmp_path, store, "fashion-mnist", less)
    assert len(result["cells"]) == 24
    assert result["reference"]["selection"]["metrics"]["accuracy"] > 0.8
    assert all(c["certificate"]["holds"] for c in result["cells"])


def test_a_mixture_beats_the_uniform_schemes_on_digits(request, tmp_path, store):
    """Smaller than any uniform scheme that is accepted, and closer than the one of its size; cells
    whose verdict is plain stop early."""
    result = shipped(request, tmp_path, store, "digits-mixed")
    cells = {c["name"]: c for c in result["cells"]}
    chosen = cells[result["decision"]["cell"]]
    uniform = [c for c in result["cells"] if c["name"].startswith("W ")]
    accepted = [c["weight_bytes"] for c in uniform if c["verdict"] == "accept"]
    assert chosen["scheme"]["label"] == "mixed weight_bytes 0.11"
    assert chosen["weight_bytes"] < 0.9 * min(accepted)
    int3 = next(c for c in uniform if c["scheme"]["weights"]["format"] == "int3")
    same_size = cells["mixed weight_bytes 0.102"]
    assert same_size["weight_bytes"] <= int3["weight_bytes"]
    assert same_size["metrics"]["kl_mean"] < 0.7 * int3["metrics"]["kl_mean"]
    int2 = next(c for c in uniform if c["scheme"]["weights"]["format"] == "int2")
    assert int2["verdict"] == "reject"
    assert int2["stopped"]["examples"] <= 128
