"""Several tasks for one subject, real text, slices and clusters, and data that does not fit."""

import json

import pytest
from tasks_config import config_of, refused, serve, written
from tiny_models import bert, gpt2, texts

from audit import encode
from audit.lookup import find
from audit.note import sweep_note
from audit.store import Store
from evaluators.metric import Outcomes
from flows.conduct import conduct
from flows.config import read_plan
from halfstep.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {"columns": ["first", "second"], "max_length": 32}


def pair_rows(n=240):
    rows = []
    for i, (a, b) in enumerate(zip(texts(n), texts(n, 1), strict=True)):
        near = i % 2 == 0
        second = a.split()[: max(2, len(a.split()) - i % 3)] if near else b.split()
        rows.append({"first": a, "second": " ".join(second), "near": int(near),
                     "grade": float(near) + 0.01 * (i % 7), "lang": "de" if i % 3 else "en",
                     "user": i // 6})  # fmt: skip
    return rows


def pools():
    rows = pair_rows()
    return {"train": rows[:60], "validation": rows[60:150], "test": rows[150:]}


def task(name, evaluator, criteria, label="near", calibration=True, **more):
    splits = {"selection": {"from": "validation"}, "confirmation": {"from": "test"}}
    if calibration:
        splits["calibration"] = {"from": "train", "samples": 24}
    data = {"source": "factory", "target": "subjects:rows", "text": dict(TEXT), "label": label}
    made = {"name": name, "evaluator": evaluator, "data": data, "splits": splits}
    return made | {"criteria": criteria} | more


def tasks():
    return [
        task("similar", "sentence_similarity", [{"metric": "spearman", "max_drop": 0.2}], "grade"),
        task("near", "ranking", [{"metric": "weight_bytes", "max_ratio": 0.1}], calibration=False),
        task("again", "ranking", [{"metric": "drift", "max_increase": 0.5}], calibration=False,
             cluster="user"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    serve(pools())
    config = config_of(bert(folder / "model", "Model"), architecture="sentence_embedding")
    config["tasks"] = tasks()
    config["matrix"] = {"weights": {"format": ["int8", "int2"]}, "activations": {"format": "int8"}}
    path = written(folder, config)
    store = Store(folder / "mlruns")
    return conduct(read_plan(path), path.read_text(), store), store, path


def test_a_verdict_for_each_task_and_one_overall(done):
    result, _, _ = done
    assert [t["name"] for t in result["tasks"]] == ["similar", "near", "again"]
    assert len(result["cells"]) == 6
    int8 = result["schemes"][0]
    assert int8["tasks"]["similar"] == int8["tasks"]["again"] == "accept"
    assert int8["tasks"]["near"] == "reject"
    assert int8["verdict"] == int8["tasks"]["near"]
    assert result["decision"]["cell"] is None
    cells = {(c["name"], c["task"]): c for c in result["cells"]}
    assert cells[int8["name"], "near"]["certificate"] == cells[int8["name"], "again"]["certificate"]


def test_one_calibration_serves_all_tasks(done):
    result, store, _ = done
    assert result["calibration"]["rows"] <= 48
    keys = {p.name for p in store.spool.glob("*/calibration/*") if (p / "record.json").exists()}
    assert len(keys) == 1
    drift = next(store.spool.glob("*/calibration/*/files/representativeness.csv")).read_text()
    assert {line.split(",")[0] for line in drift.splitlines()[1:]} == {"similar", "near", "again"}


def test_the_trail_shows_the_task_of_every_run(done):
    result, store, _ = done
    cell = find(store, result["cells"][1]["run_id"])
    assert cell["name"] == f"{result['cells'][1]['name']} · near"
    assert cell["params"]["task"] == "near"
    note = sweep_note(result)
    assert "| scheme | overall | similar | near | again |" in note
    assert "similar: spearman may drop by less than 0.2" in note
    page = (store.artifacts.parent / "artifacts").rglob("report.html")
    text = next(page).read_text()
    assert text.count("<figure>") >= 5
    assert "resampled by user" in text


def test_outcomes_hold_what_clusters_go_by(done):
    result, store, _ = done
    found = next(c for c in result["cells"] if c["task"] == "again")
    folder = store.spool / result["sweep_id"] / "cell" / found["key"][:16]
    data = (folder / "files" / "outcomes-selection.parquet").read_bytes()
    outcomes = Outcomes(encode.read_parquet(data))
    assert len(set(outcomes.clusters)) < len(outcomes)
    assert found["outcomes_digest"] == encode.columns_digest(outcomes.columns)


def test_a_task_that_is_added_reuses_what_the_others_did(done, monkeypatch):
    """Cells are keyed by their own task; only what is new is run. Calibration is shared, so the
    task that is added must not bring its own."""
    result, store, path = done
    serve(pools())
    text = path.read_text()
    fewer = path.with_name("fewer.yaml")
    fewer.write_text(text.replace("max_drop: 0.2", "max_drop: 0.2"))
    import yaml

    config = yaml.safe_load(text)
    config["tasks"] = config["tasks"][:2]
    fewer.write_text(yaml.safe_dump(config))
    other = conduct(read_plan(fewer), fewer.read_text(), store)
    assert other["cells_reused"] == 4
    digests = {(c["name"], c["task"]): c["outcomes_digest"] for c in result["cells"]}
    assert all(digests[c["name"], c["task"]] == c["outcomes_digest"] for c in other["cells"])


def test_a_slice_of_any_column(tmp_path, store):
    serve(pools())
    config = config_of(bert(tmp_path / "m", "Model"), architecture="sentence_embedding")
    rule = {"metric": "auroc", "max_drop": 0.45, "slice": "lang", "min_examples": 20}
    config["tasks"] = [task("near", "ranking", [rule])]
    path = written(tmp_path, config)
    result = conduct(read_plan(path), path.read_text(), store)
    parts = result["cells"][0]["findings"][0]["slices"]
    assert {p["slice"] for p in parts} == {"de", "en"}
    assert sum(p["examples"] for p in parts) == 90
    assert "by lang" not in result["cells"][0]["reasons"][0]
    resolved = json.loads(next(store.spool.rglob("plan.json")).read_text())
    assert resolved["tasks"][0]["data"]["keep"] == ["lang"]


def test_a_language_model_is_judged_by_document(tmp_path, store):
    rows = [{"text": " ".join(texts(6, i))} for i in range(60)]
    serve({"train": rows[:20], "validation": rows[20:40], "test": rows[40:]})
    config = config_of(
        gpt2(tmp_path / "m"), architecture="causal_lm", evaluator="language_modelling",
        data={"source": "factory", "target": "subjects:rows",
              "language": {"column": "text", "block": 8}},
        criteria=[{"metric": "perplexity", "max_increase": 5.0},
                  {"metric": "top1_agreement", "max_drop": 0.9}],
    )  # fmt: skip
    path = written(tmp_path, config)
    result = conduct(read_plan(path), path.read_text(), store)
    assert result["tasks"][0]["cluster"] == "document"
    assert any("ends of documents left out" in note for note in result["notes"])
    metrics = result["cells"][0]["metrics"]
    assert 0 < metrics["kl_mean"] <= metrics["kl_p99"]
    assert metrics["top1_agreement"] > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[0]["splits"].pop("calibration"), "'calibration' is missing"),
        (lambda t: t[1].update(name="similar"), "'similar' stands twice"),
        (lambda t: t[1].update(name="a/b"), "of letters, digits, spaces"),
        (lambda t: t[1].update(evaluator={"name": "ranking", "fpr": 1}),
         r"tasks\[1\].evaluator: unknown key 'fpr'; allowed: false_positive_rate"),
        (lambda t: t[1].update(evaluator={"name": "ranking", "false_positive_rate": 2.0}),
         "false_positive_rate 2 is not allowed"),
        (lambda t: t[1]["criteria"][0].update(metric="flips"), "flips is reported, not tested"),
        (lambda t: t[2]["criteria"][0].update(min_examples=5), "min_examples is of slices"),
        (lambda t: t[1].update(max_unscored=2), "max_unscored: 2 is not allowed"),
        (lambda t: t[1]["data"]["text"].update(colums=["a"]),
         r"data.text: unknown key 'colums'.*did you mean 'columns'"),
        (lambda t: t[1]["data"].pop("text"), None),
    ],
)  # fmt: skip
def test_wrong_tasks_are_refused(tmp_path, change, message):
    config = config_of("anywhere", architecture="sentence_embedding")
    config["tasks"] = tasks()
    change(config["tasks"])
    if message is None:
        read_plan(written(tmp_path, config))  # a factory may return tensors
        return
    with pytest.raises(UserError, match=message):
        read_plan(written(tmp_path, config))


def rows_with(**changes):
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(texts(70))]
    for column, values in changes.items():
        for i, value in values.items():
            rows[i][column] = value
    return rows


REFUSED = {
    "labels out of range": (
        rows_with(label=dict.fromkeys(range(70), 7)),
        r"labels run from 7 to 7 but the model answers with 2 classes, 0 to 1"),
    "a label that is missing": (
        rows_with(label={5: None}), r"1 of .* rows cannot be scored .*label is missing"),
    "two rows alike": (
        rows_with(text=dict.fromkeys(range(70), "good film")), r"share \d+ example\(s\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_data_is_one_message_and_nothing_is_written(tmp_path, store, case):
    rows, message = REFUSED[case]
    refused(tmp_path, bert(tmp_path / "m"), store, rows, None, message)


def test_missing_labels_within_the_limit_are_counted(tmp_path, store):
    serve(rows_with(label={5: None}))
    path = written(tmp_path, config_of(bert(tmp_path / "m"), max_unscored=0.05))
    result = conduct(read_plan(path), path.read_text(), store)
    assert any("rows of pool" in note and "could not be used" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"splits": {"calibration": {"from": "train"}, "selection": {"from": "valid"},
                     "confirmation": {"from": "test"}}}, "no pool 'valid'.*did you mean"),
        ({"criteria": [{"metric": "accuracy", "max_drop": 0.4, "slice": "lng"}]},
         "no column 'lng'; allowed: text, label"),
        ({"criteria": [{"metric": "accuracy", "max_drop": 0.4, "slice": "label",
                        "min_examples": 100}]},
         r"no slice of split 'selection' holds min_examples"),
        ({"evaluator": "multi_label", "criteria": [{"metric": "micro_f1", "max_drop": 0.4}]},
         "a row of 0 and 1"),
        ({"evaluator": "token_classification",
          "criteria": [{"metric": "token_accuracy", "max_drop": 0.4}]},
         r"expected logits \[batch, tokens, labels\]; the model returned \[\d+, 2\]"),
    ],
)  # fmt: skip
def test_tasks_that_do_not_fit_their_data_are_refused(tmp_path, store, task, message):
    serve(rows_with())
    path = written(tmp_path, config_of(bert(tmp_path / "m"), **task))
    with pytest.raises(UserError, match=message):
        conduct(read_plan(path), path.read_text(), store)
    assert not store.database.exists()


def test_inputs_that_the_model_cannot_take_are_named_with_their_shapes(tiny, store):
    def change(config):
        config["subject"] = {"source": "factory", "target": "subjects:attentive"}
        config["tasks"][0]["data"] = {"source": "sklearn", "name": "digits"}

    path = tiny(change)
    with pytest.raises(UserError, match=r"cannot take the data's inputs \(one tensor float32 \[n"):
        conduct(read_plan(path), path.read_text(), store)
    assert not store.database.exists()


def test_a_split_without_examples_is_named(tmp_path, store):
    rows = [{"text": t, "label": 0} for t in texts(50)]
    serve({"train": rows[:40], "validation": rows[40:], "test": []})
    config = config_of(bert(tmp_path / "m"))
    config["tasks"][0]["data"].pop("carve")
    path = written(tmp_path, config)
    with pytest.raises(UserError, match="pool 'test' holds no rows"):
        conduct(read_plan(path), path.read_text(), store)
    assert not store.database.exists()
