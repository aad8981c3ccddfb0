"""Bad models, data and stores: one message, exit code 2, nothing written."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import subjects
import torch
from safetensors.torch import save_file

from audit.store import Store
from flows.conduct import conduct
from flows.config import read_plan
from halfstep.errors import UserError

SUPPORT = Path(__file__).parent.parent / "support"


def factory(subject=None, data=None, weights=None, matrix=None):
    """A change that takes the subject and data from `subjects`."""

    def change(config):
        config["subject"] = {"source": "factory", "target": "subjects:model"}
        config["subject"] |= {"arguments": subject or {}}
        if weights:
            config["subject"]["weights"] = str(weights)
        config["tasks"][0]["data"] = {"source": "factory", "target": "subjects:data",
                                      "arguments": data or {}}  # fmt: skip
        config["matrix"] = matrix or {"weights": {"format": ["int8", "int4"]},
                                      "activations": {"format": "int8"}}  # fmt: skip

    return change


def sweep(path, store, **options):
    return conduct(read_plan(path), path.read_text(), store, **options)


def refused(path, store, message):
    with pytest.raises(UserError, match=message):
        sweep(path, store)
    assert not store.path.exists(), "bad input must not write anything"


def test_nan_in_weights(tiny, store):
    refused(tiny(factory({"nan": True})), store, r"weight first.weight .* holds 1 NaN")


def test_nan_in_data(tiny, store):
    refused(tiny(factory(data={"nan": True})), store, r"split 'selection' holds NaN .* row 7")


def test_overlapping_splits_are_found_by_content(tiny, store):
    refused(
        tiny(factory(data={"shared": 5})),
        store,
        r"'selection' and 'confirmation' share 5 example\(s\) with equal content",
    )


def test_one_pool_for_two_splits(tiny, store):
    def change(config):
        factory()(config)
        config["tasks"][0]["splits"]["confirmation"] = {"from": "validation", "seed": 3}

    refused(tiny(change), store, r"share 300 example\(s\)")


def test_more_samples_than_there_are(tiny, store):
    def change(config):
        factory()(config)
        config["tasks"][0]["splits"]["calibration"]["samples"] = 5000

    refused(tiny(change), store, r"samples: 5000 asked for, but pool 'train' holds 200")


def test_an_unknown_pool(tiny, store):
    def change(config):
        factory()(config)
        config["tasks"][0]["splits"]["selection"] = {"from": "valid"}

    refused(tiny(change), store, r"no pool 'valid'.*did you mean 'validation'")


def test_a_skip_pattern_that_matches_nothing(tiny, store):
    def change(config):
        factory()(config)
        config["sites"] = {"skip": ["lst"]}

    refused(tiny(change), store, r"'lst' matches no site.*did you mean 'last'")


def test_every_site_skipped(tiny, store):
    def change(config):
        factory()(config)
        config["sites"] = {"skip": ["*"]}

    refused(tiny(change), store, "no site is left to quantize under .*: every one is skipped")


def test_a_missing_weights_file(tiny, store, tmp_path):
    path = tiny(factory(weights=tmp_path / "none.safetensors"))
    refused(path, store, r"none.safetensors does not exist")


def test_a_corrupt_safetensors_file(tiny, store, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(subjects.model().state_dict(), good)
    bad.write_bytes(good.read_bytes()[:-40])
    refused(tiny(factory(weights=bad)), store, r"bad.safetensors is not a valid safetensors file")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("through_torch", [True, False])
def test_a_pickle_that_would_run_code(tiny, store, tmp_path, through_torch):
    evil, trap = tmp_path / "evil.pt", tmp_path / "trap"
    if through_torch:
        torch.save({"w": Payload(str(trap))}, evil)
    else:
        evil.write_bytes(pickle.dumps(Payload(str(trap))))
    refused(tiny(factory(weights=evil)), store, r"evil.pt was refused.*could run code")
    assert not trap.exists()


def test_weights_of_another_model(tiny, store, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"first.weight": torch.zeros(3, 3)}, path)
    refused(tiny(factory(weights=path)), store, r"does not fit subjects:model")


def test_a_weights_only_checkpoint_is_read(tiny, store, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(subjects.model().state_dict(), path)
    assert len(sweep(tiny(factory(weights=path)), store)["cells"]) == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("subjects:modl", r"no such function.*did you mean 'model'"),
        ("nowhere:model", r"cannot import 'nowhere'"),
        ("subjects", r"not of the form module:function"),
        ("subjects:not_a_model", r"returned int, not a torch module"),
    ],
)
def test_a_factory_that_is_none(tiny, store, target, message):
    def change(config):
        factory()(config)
        config["subject"] = {"source": "factory", "target": target}

    refused(tiny(change), store, message)


def test_missing_idx_files_say_where_to_get_them(tiny, store, tmp_path):
    def change(config):
        config["tasks"][0]["data"] = {"source": "idx", "path": str(tmp_path / "nothing")}

    refused(
        tiny(change), store, r"no train-images-idx3-ubyte.*dataset-fashion-mnist.*source: datasets"
    )


def test_all_zero_weights_are_exact_and_named(tiny, store):
    result = sweep(tiny(factory({"dead": True})), store)
    assert all(cell["status"] == "finished" for cell in result["cells"])
    assert "first weight: 16 of 16 block(s) hold only zeros" in result["cells"][0]["notes"]


def test_a_cell_that_breaks_is_recorded_and_stops_no_other(tiny, store):
    matrix = {"weights": {"format": ["int8", "int2", "int4"]}, "activations": {"format": "int8"}}
    result = sweep(tiny(factory({"breaks_on": 40}, matrix=matrix)), store)
    broken = [c for c in result["cells"] if c["status"] == "failed"]
    assert [c["name"][:6] for c in broken] == ["W int2"]
    assert broken[0]["verdict"] == "reject"
    assert "too few levels" in broken[0]["reasons"][0]
    assert len(result["cells"]) == 3


def test_no_home_path_reaches_the_trail(tiny, store, tmp_path, monkeypatch):
    """Neither through the paths of a config nor through the traceback of a cell that broke."""
    home = tmp_path / "canary-home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    weights = home / "weights.safetensors"
    save_file(subjects.model().state_dict(), weights)
    matrix = {"weights": {"format": ["int8", "int2"]}}
    change = factory({"breaks_on": 40}, weights=weights, matrix=matrix)
    result = sweep(tiny(change), store)
    assert [c["status"] for c in result["cells"]] == ["finished", "failed"]
    for path in store.path.rglob("*"):
        if path.is_file():
            assert b"canary-home" not in path.read_bytes(), path


def test_a_store_in_use_names_its_holder(tiny, store):
    with (
        store.writing("sweep of 'other'"),
        pytest.raises(UserError, match=r"in use by sweep of 'oth"),
    ):
        sweep(tiny(factory()), store)


def test_a_store_that_is_a_file(tiny, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        sweep(tiny(factory()), Store(tmp_path / "taken"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store(tiny, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        sweep(tiny(factory()), Store(folder / "mlruns"))


def test_a_store_on_a_read_only_file_system(tiny):
    with pytest.raises(UserError, match="cannot be written"):
        sweep(tiny(factory()), Store(Path("/proc/halfstep")))


@pytest.mark.parametrize("content", [b"", b"not a database at all"])
def test_a_damaged_tracking_database_is_not_replaced(tiny, store, content):
    store.path.mkdir()
    store.database.write_bytes(content)
    with pytest.raises(UserError, match=r"mlflow.db is (empty|not an SQLite database)"):
        sweep(tiny(factory()), store)
    assert store.database.read_bytes() == content


def test_a_disk_that_fills_up_loses_nothing(tiny, store):
    """Files may not grow beyond a limit, as on a full disk; then room is made."""
    path = tiny(factory())
    command = [sys.executable, "-m", "flows.cli", "sweep", str(path), "--store", str(store.path)]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)}
    full = subprocess.run(
        ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert full.stderr.strip().splitlines()[-1].startswith("halfstep: ")
    roomy = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert roomy.returncode == 0, roomy.stderr
