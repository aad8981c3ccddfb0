"""Classification metrics against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn import metrics as sk
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from evaluators.image_classification import METRICS, ClassificationOutcomes, ImageClassification
from halfstep.errors import UserError
from halfstep.subject import Examples


def outcomes(seed, n=400, classes=6, strength=1.5):
    generator = np.random.default_rng(seed)
    label = generator.integers(classes, size=n)
    logits = generator.normal(size=(n, classes))
    logits[np.arange(n), label] += strength
    return ClassificationOutcomes(label, log_softmax(logits, axis=1))


@pytest.fixture(params=range(4))
def pair(request):
    reference = outcomes(request.param)
    noise = np.random.default_rng(99).normal(size=reference.log_probability.shape)
    log_p = log_softmax(reference.log_probability + noise * 0.7, axis=1)
    return ClassificationOutcomes(reference.label, log_p), reference


def value(name, cell, reference):
    return METRICS[name].value(cell, reference)


def test_metrics_equal_scikit_learn(pair):
    cell, reference = pair
    probability = np.exp(cell.log_probability)
    recalls = sk.recall_score(cell.label, cell.prediction, average=None)
    expected = {
        "accuracy": sk.accuracy_score(cell.label, cell.prediction),
        "macro_f1": sk.f1_score(cell.label, cell.prediction, average="macro"),
        "worst_class_recall": recalls.min(),
        "log_loss": sk.log_loss(cell.label, probability, labels=range(6)),
    }
    for name, wanted in expected.items():
        assert value(name, cell, reference) == pytest.approx(wanted, rel=1e-9)


def test_calibration_error_equals_torchmetrics(pair):
    cell, reference = pair
    wanted = multiclass_calibration_error(
        torch.from_numpy(np.exp(cell.log_probability)), torch.from_numpy(cell.label), 6, n_bins=15
    )
    assert value("ece", cell, reference) == pytest.approx(float(wanted), rel=1e-5)


def test_divergence_equals_torch(pair):
    cell, reference = pair
    wanted = nn.functional.kl_div(
        torch.from_numpy(cell.log_probability),
        torch.from_numpy(reference.log_probability),
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
        np.mean(cell.prediction != reference.prediction)
    )


def test_outcomes_round_trip_through_their_table(pair):
    cell, _ = pair
    again = ImageClassification().read(cell.columns())
    assert np.array_equal(again.log_probability, cell.log_probability)


def test_an_unscored_example_is_counted_and_is_no_hit():
    reference = outcomes(0, n=50)
    log_p = reference.log_probability.copy()
    log_p[3] = np.nan
    cell = ClassificationOutcomes(reference.label, log_p)
    assert cell.unscored == 1
    assert cell.correct[3] == 0
    assert np.isfinite(value("log_loss", cell, reference))


def test_a_metric_of_nothing_is_an_error():
    empty = ClassificationOutcomes(np.empty(0, np.int64), np.empty((0, 3)))
    with pytest.raises(ValueError, match="no examples"):
        value("accuracy", empty, empty)


def test_nan_inputs_are_refused_with_their_row():
    inputs = torch.zeros(5, 2)
    inputs[3, 1] = float("nan")
    with pytest.raises(UserError, match=r"pool 'test' holds NaN or infinite values in 1 .* row 3"):
        ImageClassification().check("pool 'test'", Examples(inputs, torch.zeros(5).long()))


def test_labels_beyond_the_models_classes_are_refused():
    examples = Examples(torch.zeros(5, 2), torch.tensor([0, 1, 2, 3, 9]))
    with pytest.raises(UserError, match="labels run from 0 to 9 but the model answers with 4"):
        ImageClassification().run(nn.Linear(2, 4), examples, 2)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_does_not_change_which_example_is_which(size):
    torch.manual_seed(0)
    model, examples = nn.Linear(4, 3), Examples(torch.randn(20, 4), torch.arange(20) % 3)
    done = ImageClassification().run(model, examples, size)
    whole = ImageClassification().run(model, examples, 20)
    assert np.allclose(done.log_probability, whole.log_probability, atol=1e-6)
