"""Classification metrics against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn import metrics as sk
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from audit.encode import parquet_bytes, read_parquet
from evaluators.classification import METRICS, Classification, outcomes
from halfstep.errors import UserError
from halfstep.examples import Column, Examples, Inputs


def examples(inputs, targets):
    return Examples(Inputs.of(inputs), Column.of(targets))


def made(seed, n=400, classes=6, strength=1.5):
    generator = np.random.default_rng(seed)
    label = generator.integers(classes, size=n)
    logits = generator.normal(size=(n, classes))
    logits[np.arange(n), label] += strength
    return outcomes(label, log_softmax(logits, axis=1))


@pytest.fixture(params=range(4))
def pair(request):
    reference = made(request.param)
    noise = np.random.default_rng(99).normal(size=reference["log_p"].shape)
    log_p = log_softmax(reference["log_p"] + noise * 0.7, axis=1)
    return outcomes(reference["label"], log_p), reference


def value(name, cell, reference):
    return METRICS[name].value(cell, reference)


def test_metrics_equal_scikit_learn(pair):
    cell, reference = pair
    probability = np.exp(cell["log_p"])
    recalls = sk.recall_score(cell["label"], cell["prediction"], average=None)
    expected = {
        "accuracy": sk.accuracy_score(cell["label"], cell["prediction"]),
        "macro_f1": sk.f1_score(cell["label"], cell["prediction"], average="macro"),
        "worst_class_recall": recalls.min(),
        "log_loss": sk.log_loss(cell["label"], probability, labels=range(6)),
        "mcc": sk.matthews_corrcoef(cell["label"], cell["prediction"]),
        "brier": sk.brier_score_loss(cell["label"], probability, scale_by_half=False),
    }
    for name, wanted in expected.items():
        assert value(name, cell, reference) == pytest.approx(wanted, rel=1e-9)


def test_calibration_error_equals_torchmetrics(pair):
    cell, reference = pair
    wanted = multiclass_calibration_error(
        torch.from_numpy(np.exp(cell["log_p"])), torch.from_numpy(cell["label"]), 6, n_bins=15
    )
    assert value("ece", cell, reference) == pytest.approx(float(wanted), rel=1e-5)


def test_divergence_equals_torch(pair):
    cell, reference = pair
    wanted = nn.functional.kl_div(
        torch.from_numpy(cell["log_p"]),
        torch.from_numpy(reference["log_p"]),
        log_target=True,
        reduction="batchmean",
    )
    assert value("kl_mean", cell, reference) == pytest.approx(float(wanted), rel=1e-9)
    assert value("kl_mean", reference, reference) == 0.0


def test_flips_split_into_both_ways(pair):
    cell, reference = pair
    right, wrong = (
        value("flips_to_right", cell, reference),
        value("flips_to_wrong", cell, reference),
    )
    change = value("accuracy", cell, reference) - value("accuracy", reference, reference)
    assert right - wrong == pytest.approx(change)
    assert value("flips", cell, reference) == pytest.approx(
        np.mean(cell["prediction"] != reference["prediction"])
    )


def test_outcomes_round_trip_through_their_table(pair):
    cell, _ = pair
    again = read_parquet(parquet_bytes(cell.columns))
    assert list(again) == list(cell.columns)
    for name, values in cell.columns.items():
        assert again[name].dtype == values.dtype
        assert np.array_equal(again[name], values)


def test_an_unscored_example_is_counted_and_is_no_hit():
    reference = made(0, n=50)
    log_p = reference["log_p"].copy()
    log_p[3] = np.nan
    cell = outcomes(reference["label"], log_p)
    assert cell.unscored == 1
    assert not cell["correct"][3]
    assert np.isfinite(value("log_loss", cell, reference))


def test_a_metric_of_nothing_is_an_error():
    empty = made(0, n=5).take(np.empty(0, np.int64))
    with pytest.raises(ValueError, match="no examples"):
        value("accuracy", empty, empty)


def test_nan_inputs_are_refused_with_their_row():
    inputs = torch.zeros(5, 2)
    inputs[3, 1] = float("nan")
    with pytest.raises(UserError, match=r"pool 'test' holds NaN or infinite values in 1 .* row 3"):
        Classification().check("pool 'test'", examples(inputs, torch.zeros(5).long()))


def test_labels_beyond_the_models_classes_are_refused():
    wrong = examples(torch.zeros(5, 2), torch.tensor([0, 1, 2, 3, 9]))
    with pytest.raises(UserError, match="labels run from 0 to 9 but the model answers with 4"):
        Classification().run(nn.Linear(2, 4), wrong, 2)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_does_not_change_which_example_is_which(size):
    torch.manual_seed(0)
    model, some = nn.Linear(4, 3), examples(torch.randn(20, 4), torch.arange(20) % 3)
    done = Classification().run(model, some, size)
    whole = Classification().run(model, some, 20)
    assert np.allclose(done["log_p"], whole["log_p"], atol=1e-6)
