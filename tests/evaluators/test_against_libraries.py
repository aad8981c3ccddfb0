"""Every evaluator's metrics against a library that others wrote, on outcomes of real forward passes
or of drawn numbers."""

import numpy as np
import pytest
import scipy.stats
import torch
from faster_coco_eval import COCO, COCOeval_faster
from seqeval.metrics import f1_score as entity_f1
from sklearn import metrics as sk
from torch import nn
from torchmetrics.functional import segmentation  # noqa: F401  (fails early where it is missing)
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.retrieval import (
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)
from torchmetrics.functional.text import perplexity

from evaluators import (
    Fidelity,
    LanguageModelling,
    MultiLabel,
    ObjectDetection,
    Ranking,
    Regression,
    Retrieval,
    SemanticSegmentation,
    SentenceSimilarity,
    TokenClassification,
)
from evaluators.metric import Outcomes
from evaluators.token_classification import spans
from halfstep.errors import UserError
from halfstep.examples import Column, Examples, Inputs


class Given(nn.Module):
    """Answers with its input: the test decides what the model says."""

    def forward(self, x):
        return x


def run(evaluator, answers, targets, batch=7, reference=None, **parts):
    examples = Examples(Inputs.of(answers), targets, **parts)
    evaluator.check("pool", examples)
    return evaluator.run(Given(), examples, batch, reference=reference)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_multi_label(threshold):
    logit, label = drawn(200, 5), (drawn(200, 5, seed=1) > 0.4).long()
    evaluator = MultiLabel(threshold)
    found = run(evaluator, logit, Column.of(label))
    measured = evaluator.measure(found, found)
    given = (torch.sigmoid(logit) > threshold).long()
    assert measured["micro_f1"] == pytest.approx(sk.f1_score(label, given, average="micro"))
    assert measured["macro_f1"] == pytest.approx(sk.f1_score(label, given, average="macro"))
    assert measured["subset_accuracy"] == pytest.approx(sk.accuracy_score(label, given))
    assert measured["hamming_loss"] == pytest.approx(sk.hamming_loss(label, given))
    wanted = np.mean([sk.log_loss(label[:, i], torch.sigmoid(logit[:, i]).double())
                      for i in range(5)])  # fmt: skip
    assert measured["log_loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("outputs", [None, 3])
def test_regression(outputs):
    shape = (300,) if outputs is None else (300, outputs)
    target, said = drawn(*shape) * 10, drawn(*shape) * 10 + drawn(*shape, seed=2)
    evaluator = Regression()
    found = run(evaluator, said, Column.of(target))
    measured = evaluator.measure(found, found)
    assert measured["mae"] == pytest.approx(sk.mean_absolute_error(target, said), rel=1e-5)
    assert measured["rmse"] == pytest.approx(sk.mean_squared_error(target, said) ** 0.5, rel=1e-5)
    assert measured["r2"] == pytest.approx(sk.r2_score(target, said), rel=1e-5)
    worst = (said - target).abs().reshape(300, -1).amax(1)
    assert measured["max_error"] == pytest.approx(float(worst.max()))
    assert measured["p99_error"] == pytest.approx(
        np.quantile(worst.numpy(), 0.99, method="inverted_cdf")
    )
    assert measured["bias"] == pytest.approx(abs(float((said - target).mean())), rel=1e-4)


def test_sentence_similarity_with_ties():
    rows, members = drawn(80, 16), np.arange(80).reshape(40, 2)
    target = (drawn(40, seed=3) * 2).round()
    evaluator = SentenceSimilarity()
    found = run(evaluator, rows, Column.of(target), members=members)
    measured = evaluator.measure(found, found)
    cosine = nn.functional.cosine_similarity(rows[::2], rows[1::2])
    assert np.allclose(found["cosine"], cosine, atol=1e-6)
    wanted = scipy.stats.spearmanr(found["cosine"], target).statistic
    assert measured["spearman"] == pytest.approx(wanted)
    assert measured["pearson"] == pytest.approx(scipy.stats.pearsonr(cosine, target).statistic)


def test_weighted_statistics_equal_repeated_examples():
    """A resample counts examples; repeating them must come to the same."""
    from evaluators.statistics import auroc, average_precision, quantile, spearman

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=60).round(1), generator.normal(size=60).round(1)
    positive = y > 0.3
    counts = generator.integers(0, 4, size=(5, 60)).astype(float)
    for row in counts:
        again = np.repeat(np.arange(60), row.astype(int))
        pairs = [
            (spearman(x, y), scipy.stats.spearmanr(x[again], y[again]).statistic),
            (auroc(x, positive), sk.roc_auc_score(positive[again], x[again])),
            (average_precision(x, positive), sk.average_precision_score(positive[again], x[again])),
            (quantile(x, 0.9), np.quantile(x[again], 0.9, method="inverted_cdf")),
        ]
        for statistic, wanted in pairs:
            assert statistic.of(row[None])[0] == pytest.approx(wanted)


def test_retrieval():
    documents, queries = drawn(50, 8), drawn(12, 8, seed=4)
    generator = np.random.default_rng(0)
    relevant = [
        torch.tensor([[d, g] for d, g in zip(generator.choice(50, 4, replace=False),
                                             generator.integers(1, 4, 4), strict=True)]).float()
        for _ in range(12)
    ]  # fmt: skip
    evaluator = Retrieval(k=10)
    found = run(
        evaluator, torch.cat([queries, documents]), Column.ragged(relevant),
        members=np.arange(12)[:, None], shared=np.arange(12, 62),
    )  # fmt: skip
    score = nn.functional.normalize(queries) @ nn.functional.normalize(documents).T
    for i in range(12):
        gain = torch.zeros(50)
        gain[relevant[i][:, 0].long()] = relevant[i][:, 1]
        ndcg = retrieval_normalized_dcg(score[i], gain.long(), top_k=10)
        assert found["ndcg"][i] == pytest.approx(float(ndcg), abs=1e-6)
        recall = retrieval_recall(score[i], gain > 0, top_k=10)
        assert found["recall"][i] == pytest.approx(float(recall))
        rank = retrieval_reciprocal_rank(score[i], gain > 0)
        assert found["reciprocal_rank"][i] == pytest.approx(float(rank))
    assert evaluator.measure(found, found)["overlap"] == 1.0
    assert evaluator.measure(found, found)["drift"] == pytest.approx(0.0, abs=1e-6)


def test_ranking_and_its_threshold_from_the_reference():
    label = (drawn(400, seed=5) > 0.8).long()
    score = drawn(400) + label
    evaluator = Ranking(false_positive_rate=0.1)
    reference = run(evaluator, score, Column.of(label))
    measured = evaluator.measure(reference, reference)
    assert measured["auroc"] == pytest.approx(sk.roc_auc_score(label, score))
    assert measured["average_precision"] == pytest.approx(sk.average_precision_score(label, score))
    assert 0.09 <= measured["fpr_at_threshold"] <= 0.1
    fpr, tpr, _ = sk.roc_curve(label, score, drop_intermediate=False)
    assert measured["recall_at_fpr"] == pytest.approx(tpr[fpr <= 0.1].max())
    # A cell whose scores all rose lets more through at the deployed threshold, though its ranking
    # is the same.
    cell = run(evaluator, score + 1, Column.of(label))
    moved = evaluator.measure(cell, reference)
    assert moved["auroc"] == pytest.approx(measured["auroc"])
    assert moved["fpr_at_threshold"] > 0.3
    assert moved["recall_at_fpr"] > measured["recall_at_fpr"]


def test_language_modelling():
    logit, label = drawn(6, 9, 20), torch.randint(0, 20, (6, 9))
    label[0, 3:] = -100
    evaluator = LanguageModelling(kept=20)
    reference = run(evaluator, logit, Column.of(label), columns={"bytes": np.full(6, 30)})
    measured = evaluator.measure(reference, reference)
    wanted = float(perplexity(logit, label, ignore_index=-100))
    assert measured["perplexity"] == pytest.approx(wanted, rel=1e-5)
    nats = np.nansum(reference["nll"])
    assert measured["bits_per_byte"] == pytest.approx(nats / np.log(2) / 180, rel=1e-6)
    assert measured["kl_mean"] == 0.0
    other = logit + 0.3 * drawn(6, 9, 20, seed=6)
    columns = {"bytes": np.full(6, 30)}
    cell = run(evaluator, other, Column.of(label), reference=reference, columns=columns)
    p, q = (x.double().log_softmax(-1) for x in (logit, other))
    kl = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)[label >= 0]
    moved = evaluator.measure(cell, reference)
    assert moved["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    wanted = np.quantile(kl.numpy(), 0.99, method="inverted_cdf")
    assert moved["kl_p99"] == pytest.approx(wanted, rel=1e-4)
    same = (logit.argmax(-1) == other.argmax(-1))[label >= 0]
    assert moved["top1_agreement"] == pytest.approx(float(same.double().mean()))
    few = LanguageModelling(kept=5)
    reference = run(few, logit, Column.of(label))
    coarse = run(few, other, Column.of(label), reference=reference)
    assert 0 < few.measure(coarse, reference)["kl_mean"] < float(kl.mean())


LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def test_token_classification():
    label = torch.randint(0, 5, (30, 12), generator=torch.Generator().manual_seed(0))
    label[:, 10:] = -100
    logit = drawn(30, 12, 5)
    logit.scatter_add_(2, label.clamp(min=0)[..., None], torch.full((30, 12, 1), 2.0))
    evaluator = TokenClassification(LABELS)
    found = run(evaluator, logit, Column.of(label))
    measured = evaluator.measure(found, found)
    true = [[LABELS[t] for t in row if t >= 0] for row in label]
    said = [[LABELS[s] for s, t in zip(a, b, strict=True) if t >= 0]
            for a, b in zip(logit.argmax(-1), label, strict=True)]  # fmt: skip
    assert measured["entity_f1"] == pytest.approx(entity_f1(true, said))
    right = np.mean([s == t for a, b in zip(true, said, strict=True)
                     for s, t in zip(a, b, strict=True)])  # fmt: skip
    assert measured["token_accuracy"] == pytest.approx(right)


def test_spans_start_where_conlls_script_starts_them():
    labels = ["I-PER", "I-PER", "B-PER", "I-LOC", "O", "I-LOC"]
    assert spans(labels) == [("PER", 0, 1), ("PER", 2, 2), ("LOC", 3, 3), ("LOC", 5, 5)]


def test_semantic_segmentation():
    logit = drawn(9, 4, 8, 10)
    label = torch.randint(0, 3, (9, 8, 10), generator=torch.Generator().manual_seed(0))
    label[:, 0] = 255
    evaluator = SemanticSegmentation()
    found = run(evaluator, logit, Column.of(label))
    measured = evaluator.measure(found, found)
    wanted = multiclass_jaccard_index(
        logit.argmax(1), label, num_classes=4, ignore_index=255, average=None
    )
    assert measured["miou"] == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert measured["worst_class_iou"] == pytest.approx(float(wanted.min()), abs=1e-6)
    right = (logit.argmax(1) == label)[label != 255].double().mean()
    assert measured["pixel_accuracy"] == pytest.approx(float(right))


class Boxes(nn.Module):
    """Answers with what was drawn for each image, as DETR-like models do."""

    def forward(self, x):
        from types import SimpleNamespace

        return SimpleNamespace(logits=x[..., :4], pred_boxes=x[..., 4:])


def detections(images=25, queries=12, classes=3):
    """Images with objects, and detections that are moved copies of some of them."""
    generator = torch.Generator().manual_seed(0)
    objects, answers = [], []
    for i in range(images):
        count = i % 5
        centre = 0.2 + 0.6 * torch.rand(count, 2, generator=generator)
        size = 0.1 + 0.2 * torch.rand(count, 2, generator=generator)
        kind = torch.randint(0, classes, (count,), generator=generator)
        corners = torch.cat([centre - size / 2, centre + size / 2], 1)
        objects.append(torch.cat([kind[:, None].float(), corners], 1))
        logit = torch.randn(queries, classes + 1, generator=generator)
        box = torch.rand(queries, 4, generator=generator) * 0.3 + 0.2
        moved = torch.cat([centre, size], 1) + 0.02 * torch.randn(count, 4, generator=generator)
        box[:count] = moved
        logit[torch.arange(count), kind] += 3
        answers.append(torch.cat([logit, box], 1))
    return torch.stack(answers), objects


def coco_map(answers, objects):
    boxes, truth, found = [], [], []
    for i, rows in enumerate(objects):
        boxes.append({"id": i, "width": 1, "height": 1, "file_name": str(i)})
        for row in rows.double().tolist():
            x, y, w, h = row[1], row[2], row[3] - row[1], row[4] - row[2]
            truth.append({"id": len(truth) + 1, "image_id": i, "category_id": int(row[0]),
                          "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})  # fmt: skip
        score, kind = answers[i, :, :4].double().softmax(-1)[:, :-1].max(-1)
        for s, k, b in zip(score.tolist(), kind.tolist(), answers[i, :, 4:].double().tolist(),
                           strict=True):  # fmt: skip
            box = [b[0] - b[2] / 2, b[1] - b[3] / 2, b[2], b[3]]
            found.append({"image_id": i, "category_id": k, "bbox": box, "score": s})
    kinds = [{"id": k, "name": str(k)} for k in range(3)]
    coco = COCO({"images": boxes, "annotations": truth, "categories": kinds})
    judged = COCOeval_faster(coco, coco.loadRes(found), "bbox", print_function=lambda *a: None)
    judged.params.areaRng = [[0, 1e10]]
    judged.params.areaRngLbl = ["all"]
    judged.evaluate()
    judged.accumulate()
    precision = judged.eval["precision"][:, :, :, 0, -1]
    return precision[precision > -1].mean(), precision[0][precision[0] > -1].mean()


@pytest.mark.filterwarnings("ignore")
def test_object_detection():
    answers, objects = detections()
    evaluator = ObjectDetection()
    examples = Examples(Inputs.of(answers), Column.ragged(objects))
    evaluator.check("pool", examples)
    found = evaluator.run(Boxes(), examples, 4)
    measured = evaluator.measure(found, found)
    everything, half = coco_map(answers, objects)
    assert measured["map"] == pytest.approx(everything, abs=1e-9)
    assert measured["map_50"] == pytest.approx(half, abs=1e-9)
    # A resample that leaves images out equals the evaluation without them.
    counts = np.ones(25)
    counts[::4] = 0
    kept = np.flatnonzero(counts)
    wanted = coco_map(answers[kept], [objects[i] for i in kept])[0]
    statistic = evaluator.metrics["map"].statistic(found, found)
    assert statistic.of(counts[None])[0] == pytest.approx(wanted, abs=1e-9)


def test_fidelity():
    answer, moved = drawn(40, 6), drawn(40, 6) + 0.2 * drawn(40, 6, seed=9)
    evaluator = Fidelity(tolerance=0.2)
    targets = Column.of(torch.zeros(40).long())
    reference = run(evaluator, answer, targets)
    cell = run(evaluator, moved, targets, reference=reference)
    measured = evaluator.measure(cell, reference)
    cosine = nn.functional.cosine_similarity(answer, moved).mean()
    error = (moved - answer).norm(dim=1) / answer.norm(dim=1)
    assert measured["cosine"] == pytest.approx(float(cosine), rel=1e-5)
    assert measured["relative_error"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert measured["within"] == pytest.approx(float((error <= 0.2).double().mean()))
    same = (answer.argmax(1) == moved.argmax(1)).double().mean()
    assert measured["agreement"] == pytest.approx(float(same))


EVALUATED = {
    "multi_label": lambda: (MultiLabel(), drawn(30, 5), Column.of((drawn(30, 5) > 0).long())),
    "regression": lambda: (Regression(), drawn(30), Column.of(drawn(30, seed=1))),
    "ranking": lambda: (Ranking(), drawn(30), Column.of((drawn(30) > 0).long())),
    "token_classification": lambda: (
        TokenClassification(LABELS), drawn(30, 4, 5), Column.of(torch.randint(0, 5, (30, 4)))),
    "semantic_segmentation": lambda: (
        SemanticSegmentation(), drawn(30, 3, 4, 4), Column.of(torch.randint(0, 3, (30, 4, 4)))),
    "language_modelling": lambda: (
        LanguageModelling(), drawn(30, 4, 9), Column.of(torch.randint(0, 9, (30, 4)))),
    "fidelity": lambda: (Fidelity(), drawn(30, 5), Column.of(torch.zeros(30).long())),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATED)
def test_what_cannot_be_scored_is_counted(name):
    evaluator, answers, targets = EVALUATED[name]()
    reference = run(evaluator, answers, targets)
    broken = answers.clone()
    broken[3] = float("nan")
    examples = Examples(Inputs.of(broken), targets)
    cell = evaluator.run(Given(), examples, 7, reference=reference)
    assert (reference.unscored, cell.unscored) == (0, 1)
    assert not cell["scored"][3]
    for metric in evaluator.metrics.values():
        if metric.test is not None and metric.name != "bits_per_byte":
            statistic = metric.statistic(cell, reference)
            assert np.isfinite(statistic.of(np.ones((1, 30)))[0]), metric.name


@pytest.mark.parametrize("name", EVALUATED)
def test_outcomes_do_not_depend_on_the_batch_size(name):
    evaluator, answers, targets = EVALUATED[name]()
    tables = [run(evaluator, answers, targets, batch=size).columns for size in (1, 7, 30)]
    for found in tables[1:]:
        for column, values in tables[0].items():
            same = np.array_equal(values, found[column], equal_nan=values.dtype.kind == "f")
            assert same, column


@pytest.mark.parametrize(
    ("evaluator", "answers", "targets", "message"),
    [
        (MultiLabel(), drawn(4, 3), torch.full((4, 3), 2), "a row of 0 and 1"),
        (MultiLabel(), drawn(4, 2), torch.zeros(4, 3).long(), "3 labels each, .* answers with 2"),
        (Regression(), drawn(4, 2), drawn(4), r"expected \[batch, 1\] .* returned \[4, 2\]"),
        (Regression(), drawn(4), torch.tensor([0.0, 1, np.nan, 2]), "1 target.* first at 2"),
        (Ranking(), drawn(4), torch.tensor([0, 1, 2, 0]), "targets are 0 and 1"),
        (Ranking(), drawn(4), torch.zeros(4).long(), "every target is 0"),
        (Ranking(), drawn(4, 3), torch.tensor([0, 1, 1, 0]), r"returned \[4, 3\]"),
        (LanguageModelling(), drawn(4, 3, 9), torch.full((4, 3), 9), "token 9, the model knows 9"),
        (LanguageModelling(), drawn(4, 3, 9), torch.full((4, 3), -100), "no token to score"),
        (TokenClassification(LABELS), drawn(4, 3, 6), torch.full((4, 3), 5), "labels from 0 to 4"),
        (SemanticSegmentation(), drawn(4, 3, 2, 2), torch.full((4, 2, 2), 7), "hold class 7"),
        (SentenceSimilarity(), drawn(4, 3), drawn(4), "pairs are expected"),
        (Retrieval(), drawn(4, 3), torch.zeros(4, 1, 2), "no documents to search"),
        (ObjectDetection(), drawn(4, 3), drawn(4, 2, 4), "rows of class, x0"),
    ],
)  # fmt: skip
def test_bad_targets_and_answers_are_named(evaluator, answers, targets, message):
    with pytest.raises(UserError, match=message):
        run(evaluator, answers, Column.of(targets), batch=4)


def test_slices_of_outcomes_keep_rows_together():
    table = Outcomes({"scored": np.ones(4, bool), "x": np.arange(4), "y": np.eye(4)})
    some = table.take(np.array([2, 0]))
    assert some["x"].tolist() == [2, 0]
    assert some["y"].tolist() == np.eye(4)[[2, 0]].tolist()
