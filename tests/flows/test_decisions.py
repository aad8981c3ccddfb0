"""From cells to a decision: early stops, mixed precision, sensitivity, and the record of it all."""

import json

import jsonschema
import numpy as np
import pytest
import yaml
from mlflow.tracking import MlflowClient
from tests_config import TINY

from audit import encode
from audit.decision import schema_bytes
from audit.store import Store
from evaluators.stopping import EARLY_SHARE
from flows.conduct import conduct
from flows.config import read_plan
from flows.forecast import forecast
from flows.sensitivity import sensitivity
from halfstep.errors import UserError


def staged(config):
    """Every stage on the tiny sweep."""
    config["evaluation"] = "early"
    config["sensitivity"] = {"examples": 32}
    config["mixed_precision"] = {
        "weights": {"format": ["int8", "int4", "int3", "int2"], "calibrator": "mse"},
        "activations": {"format": "int8"},
        "budgets": [{"weight_bytes": 0.15}, {"bit_operations": 0.04}, {"accuracy": 0.05}],
        "examples": 48,
    }
    config["matrix"] = {
        "weights": {"format": ["int8", "int3", "int2"], "calibrator": "mse"},
        "activations": {"format": "int8"},
    }


def sweep(path, store, **options):
    return conduct(read_plan(path), path.read_text(), store, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(result, store, config path) of a sweep with every stage."""
    folder = tmp_path_factory.mktemp("staged")
    config = yaml.safe_load(yaml.safe_dump(TINY))
    staged(config)
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(config))
    store = Store(folder / "mlruns")
    return sweep(path, store), store, path


def artifact(store, kind, name):
    (found,) = store.spool.glob(f"*/{kind}/*/files/{name}")
    return found.read_bytes()


def test_a_clear_cell_stops_and_the_trail_says_when_and_why(done):
    result, store, _ = done
    clear = next(c for c in result["cells"] if c["stopped"])
    stop = clear["stopped"]
    assert stop["examples"] < stop["of"] == 500
    assert (stop["verdict"], stop["why"]) == ("accept", "every criterion is certainly met")
    assert f"stopped at {stop['examples']} of 500" in clear["reasons"][0]
    run = MlflowClient(store.tracking_uri).get_run(clear["run_id"])
    assert run.data.metrics["examples"] == stop["examples"]
    assert "Stopped at" in run.data.tags["mlflow.note.content"]


def test_what_a_stopped_cell_saw_is_a_part_of_the_reference_in_its_order(done):
    result, store, _ = done
    clear = next(c for c in result["cells"] if c["stopped"])
    (path,) = store.spool.glob(f"*/cell/{clear['key'][:16]}/files/outcomes-selection.parquet")
    own = encode.read_parquet(path.read_bytes())
    references = store.spool.glob("*/reference/*/files/outcomes-selection.parquet")
    whole = encode.read_parquet(next(references).read_bytes())
    assert (np.diff(own["example"]) > 0).all()
    assert (own["label"] == whole["label"][own["example"]]).all()


def test_early_and_full_come_to_the_same_verdicts(done, tiny, tmp_path):
    result, _, _ = done

    def full(config):
        staged(config)
        del config["evaluation"]

    whole = sweep(tiny(full), Store(tmp_path / "full"))
    assert [c["verdict"] for c in whole["cells"]] == [c["verdict"] for c in result["cells"]]
    assert whole["decision"]["cell"] == result["decision"]["cell"]
    assert not any(c["stopped"] for c in whole["cells"])
    for cell, early in zip(whole["cells"], result["cells"], strict=True):
        if not early["stopped"]:  # seen in another order, the outcomes are the same
            assert early["metrics"] == pytest.approx(cell["metrics"], abs=1e-6)
    assert whole["protocol_digest"] != result["protocol_digest"]


def test_a_preset_sees_everything(tiny, store):
    def change(config):
        staged(config)
        del config["mixed_precision"], config["sensitivity"]
        config["tasks"][0]["criteria"] = [{"preset": "mlperf-99"}]

    path = tiny(change)
    criterion = read_plan(path).tasks[0].criteria[0]
    assert (criterion.metric, criterion.limit) == ("accuracy", "max_relative_drop")
    result = sweep(path, store)
    assert not any(c["stopped"] for c in result["cells"])
    assert (
        "not an MLPerf result"
        in next(store.spool.glob("*/decision/*/files/decision.md")).read_text()
    )


def test_mixed_schemes_keep_their_budgets_and_are_cells_like_any_other(done):
    result, _, _ = done
    found = result["stages"]["mixed"]["found"]
    base = result["reference"]["selection"]["metrics"]
    assert [f["budget"] for f in found] == [
        {"weight_bytes": 0.15}, {"bit_operations": 0.04}, {"accuracy": 0.05}
    ]  # fmt: skip
    for one, name in zip(found, ("weight_bytes", "bit_operations"), strict=False):
        assert one[name] <= one["budget"][name] * base[name]
    assert found[2]["measured"]["metric_loss"] <= 0.05
    for one in found:
        cell = next(c for c in result["cells"] if c["name"] == one["scheme"])
        assert cell["certificate"]["holds"]
        assert cell["weight_bytes"] == one["weight_bytes"]
        assert cell["verdict"] in ("accept", "reject", "inconclusive")


def test_a_mixed_scheme_is_no_worse_than_a_uniform_one_of_its_size(done):
    stage = done[0]["stages"]["mixed"]
    for one in stage["found"][:1]:
        smaller = [u for u in stage["uniform"] if u["weight_bytes"] <= one["weight_bytes"]]
        assert smaller
        assert one["measured"]["output_error"] < min(u["output_error"] for u in smaller)


def test_predictions_are_sums_of_what_was_measured_alone(done):
    one = done[0]["stages"]["mixed"]["found"][0]
    total = sum(choice["output_error_alone"] for choice in one["choices"])
    assert one["sum_of_errors"] == pytest.approx(total)
    if not one["steps"]:
        assert one["predicted"] == pytest.approx(total)


def test_the_sensitivity_of_the_chosen_scheme_is_recorded(done):
    result, store, _ = done
    stage = result["stages"]["sensitivity"]
    assert stage["scheme"] == result["decision"]["cell"]
    errors = [row["output_error"] for row in stage["sites"]]
    assert errors == sorted(errors, reverse=True)
    assert {row["end"] for row in stage["sites"]} == {"", "first", "last"}
    for row in stage["sites"]:
        assert row["output_error_low"] <= row["output_error"] <= row["output_error_high"]
        assert row["rank_low"] <= row["rank"] <= row["rank_high"]
    client = MlflowClient(store.tracking_uri)
    names = {item.path for item in client.list_artifacts(stage["run_id"])}
    assert names == {"evidence.json", "sensitivity.csv", "sensitivity.json", "sensitivity.png"}


def test_the_decision_keeps_its_published_schema(done):
    _, store, _ = done
    decided = json.loads(artifact(store, "decision", "decision.json"))
    schema = json.loads(schema_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(decided, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(decided | {"verdict": "fine"}, schema)
    assert artifact(store, "decision", "decision.schema.json") == schema_bytes()


def test_the_digest_covers_all_but_the_issue(done):
    from halfstep.digest import digest_json

    decided = json.loads(artifact(done[1], "decision", "decision.json"))
    body = {k: v for k, v in decided.items() if k not in ("digest", "issued")}
    assert digest_json(body) == decided["digest"] == done[0]["decision"]["digest"]


def test_the_record_says_what_else_there_was_and_why_not(done):
    result, store, _ = done
    decided = json.loads(artifact(store, "decision", "decision.json"))
    schemes = {s["name"]: s["verdict"] for s in result["schemes"]}
    others = {a["name"]: a for a in decided["alternatives"]}
    assert {*others, decided["cell"]} == set(schemes)
    assert all(a["verdict"] == schemes[name] and a["why"] for name, a in others.items())
    accepted = [a for a in others.values() if a["verdict"] == "accept"]
    assert accepted
    assert all("against" in a["why"][0] for a in accepted)
    for margin in decided["margins_left"]:
        assert margin["verdict"] == "accept"
        assert margin["left"] > 0
    text = artifact(store, "decision", "decision.md").decode()
    assert text.startswith("# Decision: ACCEPT")
    for part in ("## Margins left", "## What else there was", "## Assumptions", "## Limits"):
        assert part in text
    assert f"{EARLY_SHARE:.0%} of each error level" in text
    assert "It is the first decision in its experiment." in text


def test_a_later_decision_supersedes_the_earlier_one(done):
    result, store, path = done
    again = sweep(path, store, fresh=True)
    assert again["decision"]["digest"] == result["decision"]["digest"]
    earlier = again["issued"]["supersedes"]
    assert earlier["sweep_id"] == result["sweep_id"]
    assert earlier["decision_digest"] == result["decision"]["digest"]
    run = MlflowClient(store.tracking_uri).get_run(again["run_id"])
    assert run.data.tags["halfstep.expires"] == again["issued"]["expires"]


def test_the_command_probes_a_cell_by_its_name(done, tmp_path):
    _, _, path = done
    plan, store = read_plan(path), Store(tmp_path / "mlruns")
    found = sensitivity(plan, store, "W int3 per_channel mse · A int8 per_tensor minmax", 32)
    assert found["scheme"].startswith("W int3")
    assert found["reused_passes"]
    run = MlflowClient(store.tracking_uri).get_run(found["run_id"])
    assert "| 1 |" in run.data.tags["mlflow.note.content"]
    again = sensitivity(plan, store, "W int3 per_channel mse · A int8 per_tensor minmax", 32)
    assert again == found  # recorded: nothing is run or written twice
    with pytest.raises(UserError, match="no cell of the matrix is called 'W int9'"):
        sensitivity(plan, store, "W int9", 32)


def test_the_forecast_says_what_the_examples_can_decide(tiny, store):
    def change(config):
        config["tasks"][0]["criteria"][0]["max_drop"] = 0.002

    found = forecast(read_plan(tiny(change)), store)
    selection = found["tasks"][0]["outlook"][0]
    assert not selection["decidable"]
    assert "cannot show 0.002, even with no flip at all" in selection["text"]
    assert not store.path.exists()


BAD = {
    "a budget nothing keeps": (
        {"weights": {"format": ["int8", "int4"]}, "budgets": [{"weight_bytes": 0.01}]},
        r"budgets\[0\].weight_bytes: 0.01 cannot be kept: the smallest choices come to 0\.\d+",
    ),
    "nothing to choose": (
        {"weights": {"format": "int8"}, "budgets": [{"weight_bytes": 0.5}]},
        "nothing to choose from",
    ),
    "no budget": ({"weights": {"format": ["int8", "int4"]}}, "key 'budgets' is missing"),
    "an unknown budget": (
        {"weights": {"format": ["int8", "int4"]}, "budgets": [{"bytes": 0.5}]},
        "unknown key 'bytes'",
    ),
    "too few examples": (
        {"weights": {"format": ["int8", "int4"]}, "budgets": [{"weight_bytes": 0.5}],
         "examples": 2},
        "mixed_precision.examples: 2 is not allowed",
    ),
    "only full precision": (
        {"weights": {"format": ["none"]}, "activations": {"format": ["none"]},
         "budgets": [{"weight_bytes": 0.5}]},
        "nothing to choose from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_mixed_precision_is_refused_before_anything_is_written(case, tiny, store):
    value, message = BAD[case]
    path = tiny(lambda config: config.update(mixed_precision=value))
    with pytest.raises(UserError, match=message):
        sweep(path, store)
    assert not store.spool.exists()


CRITERIA = {
    "floor of an error": ({"metric": "log_loss", "floor": 0.1}, "log_loss takes one of"),
    "two limits": ({"metric": "accuracy", "max_drop": 0.1, "floor": 0.8}, "max_drop and floor"),
    "an unknown preset": ({"preset": "mlperf-98"}, "unknown preset 'mlperf-98'"),
    "a preset and a limit": ({"preset": "mlperf-99", "max_drop": 0.1}, "is a limit by itself"),
    "all of it": ({"metric": "accuracy", "max_relative_drop": 1.5}, "lies between 0 and 1"),
}


@pytest.mark.parametrize("case", CRITERIA)
def test_a_wrong_criterion_is_refused(case, tiny):
    value, message = CRITERIA[case]
    with pytest.raises(UserError, match=message):
        read_plan(tiny(lambda config: config["tasks"][0].update(criteria=[value])))


def test_a_preset_on_a_sample_is_refused(tiny):
    def change(config):
        config["tasks"][0]["criteria"] = [{"preset": "mlperf-99.9"}]
        config["tasks"][0]["splits"]["selection"]["samples"] = 100

    with pytest.raises(UserError, match=r"mlperf-99.9 demands full sets, but splits.selection"):
        read_plan(tiny(change))


def test_the_same_limit_twice_is_refused(tiny):
    def change(config):
        config["tasks"][0]["criteria"] = [
            {"metric": "accuracy", "max_drop": 0.05},
            {"metric": "accuracy", "max_drop": 0.1, "confidence": 0.99},
        ]

    with pytest.raises(UserError, match="accuracy is limited twice"):
        read_plan(tiny(change))


def test_the_other_stages_are_checked_too(tiny):
    for key, value, message in (
        ("sensitivity", {"examples": 1}, "sensitivity.examples: 1 is not allowed"),
        ("evaluation", "fast", "unknown way to evaluate 'fast'"),
        ("decision", {"expires_after_days": 0}, "decision.expires_after_days: 0"),
    ):
        with pytest.raises(UserError, match=message):
            read_plan(tiny(lambda config, k=key, v=value: config.update({k: v})))
