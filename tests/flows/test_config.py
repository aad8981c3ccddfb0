"""Configs: every mistake gets one message that names the key, the value and what is allowed."""

import pytest
import yaml

from flows.config import read_plan
from halfstep.errors import UserError

TASK = ("tasks", 0)


def put(*keys, value):
    """A change that sets a nested key; ``value`` None-like marker ... deletes it."""

    def change(config):
        for key in keys[:-1]:
            config = config[key]
        if value is ...:
            del config[keys[-1]]
        else:
            config[keys[-1]] = value

    return change


WRONG = {
    "unknown key": (put("matrx", value={}), r"unknown key 'matrx'.*did you mean 'matrix'"),
    "unknown nested key": (
        put(*TASK, "splits", "calibraton", value={}),
        r"unknown key 'calibraton'.*'calibration'",
    ),
    "unknown format": (
        put("matrix", "weights", "format", value=["int9"]),
        r"unknown format 'int9'.*did you mean 'int",
    ),
    "unknown calibrator": (
        put("matrix", "weights", "calibrator", value="entropie"),
        r"unknown calibrator 'entropie'.*did you mean 'entropy'",
    ),
    "unknown metric": (
        put(*TASK, "criteria", 0, "metric", value="acuracy"),
        r"unknown metric 'acuracy'.*did you mean 'accuracy'",
    ),
    "unknown evaluator": (put(*TASK, "evaluator", value="images"), r"evaluator 'images'; allowed"),
    "unknown source": (put("subject", "source", value="smal_cnn"), r"'smal_cnn'.*'small_cnn'"),
    "unknown subject key": (put("subject", "wdth", value=3), r"unknown key 'wdth'.*'width'"),
    "mistyped value": (put("subject", "width", value="wide"), r"subject.width: 'wide'"),
    "empty matrix": (put("matrix", "weights", "format", value=[]), r"list is empty"),
    "everything excluded": (
        put("matrix", "exclude", value=[{"weights.format": "int8"}, {"weights.format": "int2"}]),
        r"matrix: it is empty",
    ),
    "nothing quantized": (
        put("matrix", "weights", "format", value=["int8", "none"]),
        r"quantizes nothing; exclude it with",
    ),
    "an exclude that matches nothing": (
        put("matrix", "exclude", value=[{"weights.format": "int4"}]),
        r"excludes nothing",
    ),
    "weights per token": (
        put("matrix", "weights", "granularity", value="per_token"),
        r"granularity for weights 'per_token'",
    ),
    "entropy over groups": (
        put("matrix", "weights", value={"format": "int4", "granularity": "per_group(32)",
                                        "calibrator": "entropy"}),
        r"too small for one; use mse",
    ),
    "wrong direction": (
        put(*TASK, "criteria", 0, value={"metric": "log_loss", "max_drop": 0.1}),
        r"log_loss takes one of max_increase, max_relative_increase, ceiling",
    ),
    "a margin of nothing": (
        put(*TASK, "criteria", 0, "max_drop", value=0),
        r"max_drop: 0 is not allowed",
    ),
    "a sure confidence": (
        put(*TASK, "criteria", 0, "confidence", value=1),
        r"confidence: 1 is not allowed",
    ),
    "confidence in what is counted": (
        put(*TASK, "criteria", 1, "confidence", value=0.9),
        r"counted, not sampled",
    ),
    "no criteria": (put(*TASK, "criteria", value=[]), r"at least one criterion"),
    "too few calibration samples": (
        put(*TASK, "splits", "calibration", "samples", value=3),
        r"samples: 3 is not allowed: a whole number of at least 16",
    ),
    "a missing split": (put(*TASK, "splits", "selection", value=...), r"'selection' is missing"),
    "a missing matrix": (put("matrix", value=...), r"key 'matrix' is missing"),
    "an unknown objective": (put("objective", value="weight_byte"), r"'weight_bytes'"),
    "no threads": (put("compute", value={"threads": 0}), r"compute.threads: 0"),
    "a name with a slash": (put("name", value="a/b"), r"name: 'a/b' is not allowed"),
    "two tasks of one name": (
        lambda c: c["tasks"].append(c["tasks"][0]),
        r"tasks\[1\].name: 'digits' stands twice",
    ),
    "an unknown correction": (
        put("matrix", "corrections", value=["gpqt"]),
        r"matrix.corrections: unknown correction 'gpqt'.*did you mean 'gptq'",
    ),
    "corrections out of order": (
        put("matrix", "corrections", value="gptq + smoothquant"),
        r"matrix.corrections: .*rewrite before scale",
    ),
    "a correction of nothing": (
        put("matrix", value={"activations": {"format": "int8"}, "corrections": "gptq"}),
        r"has nothing to correct; use exclude: \[\{corrections: 'gptq', weights.format: none",
    ),
    "awq with quantized activations": (
        put("matrix", value={"weights": {"format": "int4"}, "activations": {"format": "int8"},
                             "corrections": ["none", "awq"]}),
        r"with activations int8 use smoothquant, or exclude the pair",
    ),
    "sums of what is not quantized": (
        put("matrix", value={"weights": {"format": "int8"}, "sums": {"format": "uint8"}}),
        r"sums of what stays at full precision; exclude it with exclude: \[\{sums.format: uint8, ",
    ),
    "sums of an unknown format": (
        put("matrix", "sums", value={"format": "int9"}),
        r"matrix.sums.format: unknown format 'int9'",
    ),
    "moving average of weights": (
        put("matrix", "weights", "calibrator", value="moving_average"),
        r"averages over batches, and a weight has none",
    ),
    "a block of several tokens": (
        put("matrix", "activations", "granularity", value="per_block(2x32)"),
        r"matrix.activations: .* lies inside one token",
    ),
    "an override of nothing": (
        put("sites", value={"overrides": [{"names": ["head"]}]}),
        r"sites.overrides\[0\]: it changes nothing; give weights, activations or both",
    ),
    "an override nowhere": (
        put("sites", value={"overrides": [{"weights": {"format": "int8"}}]}),
        r"sites.overrides\[0\]: name the sites by names, kinds or positions",
    ),
    "an override with an unknown format": (
        put("sites", value={"overrides": [{"names": "head", "weights": {"format": "int9"}}]}),
        r"sites.overrides\[0\].weights.format: unknown format 'int9'",
    ),
    "an override at an unknown position": (
        put("sites", value={"overrides": [{"positions": "middle", "weights": "none"}]}),
        r"unknown position 'middle'; allowed: first, last",
    ),
    "targets that are no numbers": (
        put(*TASK, "splits", "calibration", "targets", value=["zero"]),
        r"splits.calibration.targets: \['zero'\] is not allowed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_refused(case, tiny):
    change, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        read_plan(tiny(change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "holds list, not a mapping"),
        ("name: a\nname: b\n", "line 2: key 'name' stands twice"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, message, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_plan(path)


def test_a_missing_file_names_the_nearest(tiny):
    path = tiny()
    with pytest.raises(UserError, match=r"does not exist.*did you mean '.*tiny.yaml'"):
        read_plan(path.with_name("tinny.yaml"))


def test_the_matrix_is_a_product_with_exclude_and_include(tiny):
    def change(config):
        config["matrix"]["exclude"] = [{"weights.format": "int2", "activations.format": "int8"}]
        config["matrix"]["include"] = [
            {"weights.format": "int4", "weights.granularity": "per_group(32)"}
        ]

    plan = read_plan(tiny(change))
    names = [scheme.name for scheme in plan.schemes]
    assert len(names) == 16 - 4 + 1
    assert "W int4 per_group(32) minmax · A fp32" in names
    assert not any(n.startswith("W int2") and "A int8" in n for n in names)


def test_corrections_are_an_axis_of_the_matrix(tiny):
    def change(config):
        config["matrix"] = {
            "weights": {"format": ["int4", "mxfp4"]},
            "activations": {"format": ["none", "int8"]},
            "corrections": ["none", "gptq", "smoothquant(alpha=0.8) + gptq + bias_correction"],
            "exclude": [{"activations.format": "none", "corrections": "gptq"}],
            "include": [{"weights.format": "nf4", "weights.granularity": "per_group(64)",
                         "corrections": "awq"}],
        }  # fmt: skip

    names = [scheme.name for scheme in read_plan(tiny(change)).schemes]
    assert len(names) == 12 - 2 + 1
    assert names[-1] == "W nf4 per_group(64) minmax · A fp32 · awq"
    last = "W mxfp4 · A int8 per_tensor minmax · smoothquant(alpha=0.8) + gptq + bias_correction"
    assert last in names


def test_sums_are_an_axis_of_the_matrix(tiny):
    def change(config):
        config["matrix"] = {
            "weights": {"format": "int8"},
            "activations": {"format": "uint8"},
            "sums": {"format": ["none", "uint8"], "calibrator": "mse"},
            "exclude": [{"sums.format": "none", "corrections": "gptq"}],
            "corrections": ["none", "gptq"],
        }

    schemes = read_plan(tiny(change)).schemes
    plain = "W int8 per_channel minmax · A uint8 per_tensor minmax"
    assert [scheme.name for scheme in schemes] == [
        plain,
        f"{plain} · sums uint8 per_tensor mse",
        f"{plain} · sums uint8 per_tensor mse · gptq",
    ]
    assert "sums" not in schemes[0].to_json()
    assert schemes[1].to_json()["sums"]["calibrator"] == "mse"


def test_overrides_are_part_of_every_scheme(tiny):
    def change(config):
        config["sites"] = {
            "skip": ["blocks.0.shortcut"],
            "overrides": [
                {"positions": ["first", "last"], "weights": {"format": "int8"}},
                {"kinds": "linear", "activations": "none"},
            ],
        }

    plan = read_plan(tiny(change))
    assert all(len(scheme.overrides) == 3 for scheme in plan.schemes)
    assert str(plan.overrides[0]) == "first, last: W int8 per_channel minmax"
    assert str(plan.overrides[1]) == "kind linear: A fp32"
    assert plan.to_json()["sites"]["overrides"][1] == {
        "names": [], "kinds": ["linear"], "positions": [], "activations": {"format": "none"}
    }  # fmt: skip


def test_block_formats_bring_their_own_granularity(tiny):
    def change(config):
        axes = {"granularity": ["per_channel", "per_tensor"], "calibrator": ["mse", "minmax"]}
        config["matrix"] = {"weights": {"format": "mxfp4", **axes}}

    plan = read_plan(tiny(change))
    assert [s.name for s in plan.schemes] == ["W mxfp4 · A fp32"]
    assert plan.folded_duplicates == 3
    assert plan.schemes[0].weights.to_json()["granularity"] == "per_block(1x32)"


def test_spellings_of_one_scheme_become_one_cell(tiny):
    def change(config):
        config["matrix"] = {
            "weights": {"format": ["bf16"], "calibrator": ["minmax", "mse"]},
            "activations": {
                "format": "int8",
                "granularity": "per_token",
                "calibrator": ["minmax", "mse", "entropy"],
            },
        }

    plan = read_plan(tiny(change))
    assert [s.name for s in plan.schemes] == ["W bf16 · A int8 per_token"]
    assert plan.folded_duplicates == 5


def test_the_resolved_config_writes_every_default_out(tiny):
    resolved = read_plan(tiny()).to_json()
    assert resolved["subject"]["learning_rate"] == 0.01
    assert resolved["tasks"][0]["criteria"][0]["confidence"] == 0.95
    assert resolved["compute"] == {"threads": 1, "batch_size": 64}
    assert yaml.safe_load(yaml.safe_dump(resolved)) == resolved


SHIPPED = {
    "digits-mixed": 4,
    "digits": 24,
    "digits-corrections": 8,
    "digits-unrepresentative": 8,
    "fashion-mnist": 24,
    "fashion-mnist-corrections": 12,
    "fashion-mnist-deployed": 8,
    "minilm-deployed": 8,
    "diabetes": 12,
    "breast-cancer": 6,
    "small-lm": 8,
    "minilm": 6,
}


def test_every_shipped_config_is_valid(request):
    folder = request.config.rootpath / "configs"
    found = {path.stem: len(read_plan(path).schemes) for path in folder.glob("*.yaml")}
    assert found == SHIPPED


def test_the_unrepresentative_config_differs_in_its_calibration_data_alone(request):
    folder = request.config.rootpath / "configs"
    one, other = (
        read_plan(folder / f"digits-{name}.yaml").to_json()
        for name in ("corrections", "unrepresentative")
    )
    assert other["tasks"][0]["splits"]["calibration"].pop("targets") == [0, 1, 2, 3, 4]
    other["name"] = one["name"]
    assert one == other
