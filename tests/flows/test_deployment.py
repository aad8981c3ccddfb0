"""Sweeps that run cells on real kernels: compared, timed, decided, registered, reproduced."""

import json
from pathlib import Path

import forked
import pytest
import torch
from jsonschema import validate
from mlflow.tracking import MlflowClient
from recorded import small_config, small_sweep

from audit.reading import TrackingStore
from audit.store import Store
from audit.trail import Trail
from audit.verify import verify
from backends import Artefact, backend
from backends.inductor import no_compiler
from flows.conduct import conduct
from flows.config import read_plan
from flows.reproduce import reproduce
from halfstep.batches import answer, forward
from halfstep.errors import UserError
from halfstep.interval import Interval

NAME = "W int8 per_channel minmax · A uint8 per_tensor minmax"
ORT, VINO = f"{NAME} · onnxruntime", f"{NAME} · openvino"


def deployed(config):
    config["matrix"] = {
        "weights": {"format": "int8", "granularity": "per_channel"},
        "activations": {"format": "uint8"},
        "backend": ["onnxruntime", "openvino"],
    }
    config["tasks"][0]["criteria"] = [
        {"metric": "accuracy", "max_drop": 0.1},
        {"metric": "simulation_gap", "ceiling": 0.01},
        {"metric": "latency_p50_ms", "ceiling": 1000},
    ]
    config["deployment"] = {
        "queries": 70,
        "batch_sizes": [1, 4],
        "prices": {"per_hour": 0.5, "currency": "EUR"},
    }
    config["objective"] = "latency_p50_ms"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployed")
    store = Store(folder / "mlruns")
    return store, small_sweep(folder, store, deployed)


def test_every_deployed_cell_has_its_simulation_beside_it(swept):
    _, result = swept
    assert [c["name"] for c in result["cells"]] == [NAME, ORT, VINO]
    assert [c["backend"] for c in result["cells"]] == ["simulated", "onnxruntime", "openvino"]
    assert {c["status"] for c in result["cells"]} == {"finished"}
    detail = result["stages"]["deployment"]["schemes"]
    for name in (ORT, VINO):
        (found,) = detail[name]["agreement"].values()
        assert found["examples"] == 500
        assert found["gap"] < 1e-3
        assert abs(found["headline"] - found["simulated"]) < 0.02
        assert detail[name]["artefact"]["digest"] in {
            c["artefact"]["digest"] for c in result["cells"] if c["artefact"]
        }
    assert detail[ORT]["sites"]["compared"] == 5
    assert detail[ORT]["sites"]["largest_steps"] <= 1
    assert detail[VINO]["sites"]["reason"]


def test_simulated_cells_are_evidence_and_not_chosen(swept):
    _, result = swept
    simulated, *real = result["cells"]
    assert simulated["measured"] == {}
    assert [f["criterion"]["metric"] for f in simulated["findings"]] == ["accuracy"]
    assert [f["criterion"]["metric"] for f in real[0]["findings"]][1:] == [
        "simulation_gap", "latency_p50_ms"
    ]  # fmt: skip
    times = {c["name"]: c["measured"]["latency_p50_ms"] for c in real}
    fastest = min(times.values(), key=lambda t: t["value"])
    assert result["decision"]["verdict"] == "accept"
    assert times[result["decision"]["cell"]]["low"] <= fastest["high"]
    why = {a["name"]: a["why"] for a in result["decision"]["alternatives"]}
    assert why[NAME] == ["it is a simulation: evidence for the cell that a backend runs"]


def test_what_was_measured_is_metrics_of_the_runs(swept):
    store, result = swept
    client = MlflowClient(store.tracking_uri)
    reference = result["tasks"][0]["reference"]["selection"]
    for evaluation in (*result["cells"][1:], reference):
        metrics = client.get_run(evaluation["run_id"]).data.metrics
        assert evaluation["measured"]
        for name, found in evaluation["measured"].items():
            assert metrics[name] == found["value"], name
    assert "latency_p50_ms" not in client.get_run(result["cells"][0]["run_id"]).data.metrics


def test_only_percentiles_that_70_queries_support_are_told(swept):
    _, result = swept
    told = result["stages"]["deployment"]["timing"]["contenders"]
    assert list(told) == ["reference", ORT, VINO]
    for one in told.values():
        assert "p99" not in one["batches"][0]["percentiles"]
        assert [b["batch_size"] for b in one["batches"]] == [1, 4]
        for batch in one["batches"]:
            assert 0 < batch["throughput"]["low"] <= batch["throughput"]["value"]
    assert told["reference"]["batches"][0]["speed_up"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert told[ORT]["cost"]["currency"] == "EUR"
    per_second = 1 / told[ORT]["cost"]["value"] * 0.5 / 3600 * 1e6
    best = max((b["throughput"] for b in told[ORT]["batches"]), key=lambda t: t["low"])
    assert per_second == pytest.approx(best["value"])
    assert told[ORT]["memory"]["artefact_bytes"] > 0
    assert told[ORT]["memory"]["resident_bytes"] is not None
    assert told["reference"]["memory"]["peak_activation_bytes"] >= 16 * 4 * 4


def test_the_decision_says_what_was_bought(swept):
    store, result = swept
    rows = {row["what"]: row for row in result["decision"]["bought"]}
    assert {"accuracy", "weight_bytes", "latency_p50_ms", "cost_per_million"} <= set(rows)
    assert rows["weight_bytes"]["ratio"]["value"] < 1
    assert "resident_bytes" not in rows  # read of a process for the one, counted for the other
    assert result["decision"]["target"]["declared"] == "here"
    client, run = MlflowClient(store.tracking_uri), result["run_id"]

    def read(name):
        return Path(client.download_artifacts(run, name)).read_text()

    record = json.loads(read("decision.json"))
    validate(record, json.loads(read("decision.schema.json")))
    assert "## What was bought for what" in read("decision.md")
    page = read("report.html")
    assert "Deployment" in page
    assert "latency_p50_ms" in page
    assert "nan" not in page.lower().split("<body>")[1].split("base64")[0]


def test_the_registered_artefact_reloads_to_its_digest(swept):
    store, result = swept
    (place,) = store.artifacts.glob("tiny/models/*/artifacts/deployed")
    chosen = next(c for c in result["cells"] if c["name"] == result["decision"]["cell"])
    made = Artefact.read(place, ["model.json", "model.onnx"])
    assert made.digest == chosen["artefact"]["digest"]
    opened = backend(chosen["backend"]).open(made, torch.nn.Identity(), 1)
    assert answer(forward(opened, torch.rand(5, 1, 8, 8))).shape == (5, 10)


def test_it_verifies_and_reproduces(swept):
    store, result = swept
    assert verify(TrackingStore(store)).findings == []
    again = reproduce(store, result["sweep_id"])
    assert again["status"] == "identical", [c for c in again["checks"] if not c["equal"]]
    cell = next(c for c in result["cells"] if c["name"] == ORT)
    assert reproduce(store, cell["run_id"])["status"] == "identical"


def test_a_second_run_measures_nothing_again(swept, tmp_path):
    store, result = swept
    again = small_sweep(tmp_path, store, deployed)
    assert again["reused"]
    assert again["decision"] == result["decision"]


def test_a_limit_that_is_not_surely_kept_is_inconclusive(swept, tmp_path):
    """The bounds of what is measured are part of the verdict."""
    from evaluators.acceptance import Candidate, _measure
    from evaluators.criterion import Criterion
    from evaluators.metric import Outcomes

    nothing = Outcomes({})
    cell = Candidate("c", nothing, {}, measured={"latency_p50_ms": Interval(10, 8, 12)})
    base = Candidate("r", nothing, {}, measured={"latency_p50_ms": Interval(20, 19, 21)})

    def verdict(limit, margin):
        return _measure(cell, base, Criterion("latency_p50_ms", limit, margin)).verdict

    assert [verdict("ceiling", m) for m in (12, 11, 7)] == ["accept", "inconclusive", "reject"]
    # 8/21 to 12/19
    assert [verdict("max_ratio", m) for m in (0.64, 0.6, 0.38)] == [
        "accept", "inconclusive", "reject"
    ]  # fmt: skip
    missing = _measure(cell, base, Criterion("cost_per_million", "ceiling", 1.0))
    assert missing.verdict == "inconclusive"
    assert "is not known" in missing.reason


def test_what_cannot_be_told_apart_is_not_chosen_by_noise():
    from types import SimpleNamespace as Of

    from evaluators import EVALUATORS
    from tasks.decide import cheapest

    task = Of(name="t", evaluator=EVALUATORS["image_classification"]())
    plan = Of(objective="latency_p50_ms", tasks=[task])

    def cell(name, latency, distance):
        record = Of(metrics={task.evaluator.closeness: distance})
        return name, {
            "t": Of(resources={"bit_operations": 1.0}, measured={"latency_p50_ms": latency},
                    record=record)
        }  # fmt: skip

    noisy = [cell("a", Interval(10, 9, 11), 0.5), cell("b", Interval(10.5, 9.5, 11.5), 0.1),
             cell("c", Interval(20, 19, 21), 0.0)]  # fmt: skip
    assert cheapest(plan, noisy) == "b"
    clear = [cell("a", Interval(10, 9.9, 10.1), 0.5), noisy[1]]
    clear[1] = cell("b", Interval(10.5, 10.4, 10.6), 0.1)
    assert cheapest(plan, clear) == "a"
    assert cheapest(plan, []) is None


def test_a_declared_target_that_can_only_simulate_is_named(tmp_path):
    def old(config):
        deployed(config)
        config["deployment"]["target"] = "x86-avx2"
        config["matrix"]["backend"] = "onnxruntime"

    result = small_sweep(tmp_path, Store(tmp_path / "mlruns"), old)
    assert (
        "in simulation only, because x86-avx2 has no int8 products"
        in (result["decision"]["summary"])
    )
    assert result["decision"]["target"]["why_simulated"].startswith("x86-avx2 has no int8")


def test_torchao_in_a_sweep(tmp_path):
    def dynamic(config):
        deployed(config)
        config["matrix"]["activations"] = {"format": "int8_full", "granularity": "per_token"}
        config["matrix"]["backend"] = "torchao"
        keep = {"kinds": ["conv2d"], "weights": "none", "activations": "none"}
        config["sites"] = {"overrides": [keep]}

    result = small_sweep(tmp_path, Store(tmp_path / "mlruns"), dynamic)
    (found,) = result["stages"]["deployment"]["schemes"].values()
    assert found["nodes"]["int8"] == 1  # the head; convolutions are left out
    assert next(iter(found["agreement"].values()))["gap"] < 1e-6
    assert result["decision"]["verdict"] == "accept"


def at(config, path, value):
    *way, last = path.split(".")
    for key in way:
        config = config[int(key)] if key.isdigit() else config[key]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("matrix.backend", "tensorrt", "matrix.backend: unknown backend 'tensorrt'"),
        ("matrix.weights.format", "int4", "onnxruntime cannot run 'W int4 per_channel minmax"),
        ("matrix.backend", "simulated", "deployment: no cell names a backend"),
        ("deployment.target", "x86-avx", "unknown target 'x86-avx'"),
        ("deployment.queries", 63, "deployment.queries: 63 is not allowed"),
        ("deployment.batch_sizes", [8, 1], "deployment.batch_sizes: [8, 1] is not allowed"),
        ("deployment.batch_sizes", [2], "the first of them 1"),
        ("deployment.cpus", [4096], "deployment.cpus: [4096] is not allowed"),
        ("deployment.prices", {"currency": "EUR"}, "key 'per_hour' is missing"),
        ("deployment.prices", {"per_hour": -1}, "deployment.prices.per_hour: -1 is not allowed"),
        ("deployment.colour", "red", "deployment: unknown key 'colour'"),
        ("objective", "latency", "unknown resource 'latency'"),
    ],
)
def test_bad_input_is_one_message(tmp_path, path, value, message):
    def change(config):
        deployed(config)
        at(config, path, value)

    config = small_config(tmp_path, change)
    done = forked.run("sweep", config, "--store", tmp_path / "mlruns")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "mlruns").exists() or not list((tmp_path / "mlruns").glob("spool/*"))


def test_a_backend_that_is_not_installed(tmp_path, monkeypatch):
    import backends

    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'halfstep\[onnxruntime\]'"):
        backend("onnxruntime")
    assert read_plan(small_config(tmp_path, deployed)).deploys


def test_a_sweep_that_dies_between_closed_cells_keeps_its_times(tmp_path, store, monkeypatch):
    """Metrics that were logged before are not logged again, nor measured anew."""
    real, closed = Trail.end, []

    def deadly(self, run_id, *arguments):
        digest = real(self, run_id, *arguments)
        closed.append(run_id)
        if len(closed) == 2:
            raise RuntimeError("it died here")
        return digest

    with monkeypatch.context() as patched:
        patched.setattr(Trail, "end", deadly)
        with pytest.raises(BaseException, match="it died here"):
            small_sweep(tmp_path, store, deployed)
    client = MlflowClient(store.tracking_uri)
    before = client.get_run(closed[1]).data.metrics["latency_p50_ms"]
    path = small_config(tmp_path, deployed)
    result = conduct(read_plan(path), path.read_text(), store)
    history = client.get_metric_history(result["cells"][1]["run_id"], "latency_p50_ms")
    assert [point.value for point in history] == [before]
    assert result["cells"][1]["measured"]["latency_p50_ms"]["value"] == before
    assert verify(TrackingStore(store)).findings == []


@pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())
def test_inductor_in_a_sweep(tmp_path, store):
    def settings(config):
        deployed(config)
        config["matrix"]["backend"] = "inductor"

    result = small_sweep(tmp_path, store, settings)
    _, real = result["cells"]
    assert {c["status"] for c in result["cells"]} == {"finished"}
    assert result["decision"]["cell"] == real["name"] == f"{NAME} · inductor"
    told = result["stages"]["deployment"]["schemes"][real["name"]]
    (agreement,) = told["agreement"].values()
    assert agreement["gap"] < 1e-6
    assert agreement["differing"] < 0.1  # most answers are the simulation's, bit for bit
    assert told["nodes"]["int8"] == told["nodes"]["products"] > 0
    assert verify(TrackingStore(store)).findings == []
