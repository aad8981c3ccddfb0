"""Corrected weights are kept by the digest of all that they depend on, and taken up from there."""

import torch
from recorded import small_config
from registry import moved, register, trained, watching_config

from audit.reading import TrackingStore
from audit.store import Store
from audit.trail import connect
from audit.verify import verify
from flows.conduct import conduct
from flows.config import read_plan
from flows.launch import Launch
from flows.watch import Watcher
from halfstep.digest import digest_tensors


def corrected(config):
    config["matrix"] = {
        "weights": {"format": ["int4"], "granularity": "per_channel"},
        "activations": {"format": "int8"},
        "corrections": ["none", "gptq", "adaround"],
    }


def run(config, store, fresh=False):
    return conduct(read_plan(config), config.read_text(), store, fresh=fresh)


def test_a_new_version_takes_up_the_weights_that_did_not_change(store, tmp_path):
    """The head of the second version is another; what comes before it is the same, and meets the
    same inputs."""
    for model in (trained(), moved(0.001)):
        register(store, model, tmp_path)
    config, told = watching_config(tmp_path, corrected), []
    Watcher(Launch(config, store.path), since=1, told=told.append).run(0.1, once=True)
    first, second = told
    assert first["reused"] == {}
    assert second["reused"] == {first["sweep_id"]: 2}, "one layer, under two corrections"
    note = connect(store).get_run(second["run_id"]).data.tags["mlflow.note.content"]
    assert f"**Reused**: 2 piece(s) from {first['sweep_id']}." in note
    assert verify(TrackingStore(store)).findings == []
    alone = Store(tmp_path / "alone")
    register(alone, trained(), tmp_path)
    register(alone, moved(0.001), tmp_path)
    told.clear()
    Watcher(Launch(config, alone.path), told=told.append).run(0.1, once=True)
    assert told[0]["reused"] == {}
    here, there = (decision(s, e) for s, e in ((store, second), (alone, told[0])))
    assert here == there


def decision(store, event):
    return connect(store).get_run(event["run_id"]).data.tags["halfstep.decision_digest"]


def test_anything_else_that_moves_a_bit_makes_another_key(monkeypatch):
    from halfstep import treatments
    from halfstep.corrections import Gptq
    from halfstep.formats import FORMATS
    from halfstep.granularity import PerAxis
    from halfstep.layout import rows_of
    from halfstep.moments import Moments
    from halfstep.scheme import Spec

    def key(**change):
        x = torch.ones(1, 4, dtype=torch.float64)
        moments = Moments(x, torch.eye(4, dtype=torch.float64)[None], x, x, change.pop("kernel", 1))
        given = {
            "weight": torch.ones(3, 4), "spec": Spec(FORMATS["int4"], PerAxis(), "minmax"),
            "layout": rows_of((3, 4), [0]), "corrections": (Gptq(),), "moments": moments,
            "rewritten": False, **change,
        }  # fmt: skip
        return treatments._weight_digest(*given.values())

    other = torch.ones(3, 4)
    other[0, 0] = 1.0000001
    changes = [
        {}, {"weight": other}, {"spec": Spec(FORMATS["int8"], PerAxis(), "minmax")},
        {"layout": rows_of((3, 4), [1])}, {"corrections": (Gptq(damp=0.02),)}, {"moments": None},
        {"rewritten": True}, {"kernel": 2},
    ]  # fmt: skip
    assert len({key(**change) for change in changes}) == len(changes)
    assert key() == key()
    assert digest_tensors({"a": other}) != digest_tensors({"a": torch.ones(3, 4)})


def test_fresh_takes_nothing_up(tmp_path, store):
    config = small_config(tmp_path, corrected)
    first = run(config, store)
    assert run(config, store, fresh=True)["weights_from"] == {}
    text = config.read_text().replace("name: tiny", "name: renamed")
    config.write_text(text.replace("samples: 64", "samples: 65"))
    other = run(config, store)
    assert other["weights_from"] == {}, "other calibration data, other inputs"
    assert other["sweep_id"] != first["sweep_id"]
