"""Token classification: named entities and other labels token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from evaluators import paired
from evaluators.evaluator import Evaluator, Progress, named, run_rows, silent, table, tensor_of
from evaluators.metric import Metric, Outcomes, Sums
from evaluators.statistics import f1, mean, pooled
from halfstep.errors import UserError
from halfstep.examples import Examples

WANTED = "logits [batch, tokens, labels]"


@dataclass(frozen=True)
class TokenClassification(Evaluator):
    """Targets are label numbers a token; negative ones (-100) are not scored.

    With ``labels`` in the IOB scheme (``O``, ``B-PER``, ``I-PER`` …) spans are scored as CoNLL's
    evaluation script does (Tjong Kim Sang and De Meulder 2003), which is seqeval's default:
    ``entity_f1`` over all spans, ``exact`` for the share of sentences whose spans are all right.
    """

    labels: tuple[str, ...] = ()

    headline: ClassVar[str] = "token_accuracy"
    closeness: ClassVar[str] = "flips"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        tokens = (
            Metric("token_accuracy", True, _token_accuracy, paired.bootstrap),
            Metric("flips", False, _flips),
        )
        if not self.labels:
            return named(*tokens)
        return named(
            Metric("entity_f1", True, _entity_f1, paired.bootstrap),
            Metric("exact", True, lambda c, r: mean(1.0 * c["exact"]), paired.binary),
            *tokens,
        )

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        def read(returned: Any, batch: Any, which: Any) -> dict[str, np.ndarray]:
            logits = tensor_of(returned, 3, WANTED)
            target = examples.targets.rows(which).long()
            if target.shape != logits.shape[:2]:
                raise UserError(
                    f"expected logits for {list(target.shape)} tokens; the model returned "
                    f"{list(logits.shape)}"
                )
            for name, most in (
                ("the model's answers", logits.shape[2]),
                ("the evaluator's labels", len(self.labels) or logits.shape[2]),
            ):
                if int(target.max()) >= most:
                    raise UserError(
                        f"labels run up to {int(target.max())}, {name} from 0 to {most - 1}"
                    )  # fmt: skip
            usable = torch.isfinite(logits).all(-1).all(-1)
            return {
                "label": target.clamp(min=-1).to(torch.int32).numpy(),
                "prediction": logits.argmax(-1).to(torch.int32).numpy(),
                "usable": usable.numpy(),
            }

        found = run_rows(model, examples.inputs, batch_size, read, progress)
        usable = found.pop("usable").astype(bool)
        found["prediction"] = np.where(
            (found["label"] >= 0) & usable[:, None], found["prediction"], -1
        )
        if self.labels:
            found |= self._spans(found["label"], found["prediction"])
        return table(found, usable)

    def _spans(self, label: np.ndarray, prediction: np.ndarray) -> dict[str, np.ndarray]:
        counts = []
        for true, said in zip(label, prediction, strict=True):
            names = [(self.labels[t], self.labels[s] if s >= 0 else "O")
                     for t, s in zip(true, said, strict=True) if t >= 0]  # fmt: skip
            ours, theirs = set(spans([n[1] for n in names])), set(spans([n[0] for n in names]))
            counts.append((len(ours & theirs), len(ours), len(theirs), ours == theirs))
        hits, given, wanted, exact = np.array(counts).T
        return {"hits": hits, "given": given, "wanted": wanted, "exact": exact.astype(bool)}


def spans(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first, last) of every span of IOB labels, a span starting wherever CoNLL's script
    starts one: also at an ``I-`` that follows another kind."""
    found = []
    start, kind = 0, ""
    for i, label in enumerate([*labels, "O"]):
        prefix, _, name = label.partition("-")
        opens = prefix == "B" or (prefix == "I" and name != kind)
        if kind and (opens or prefix == "O"):
            found.append((kind, start, i - 1))
            kind = ""
        if opens:
            start, kind = i, name or "_"
    return found


def _token_accuracy(cell: Outcomes, _: Outcomes) -> Sums:
    counted = cell["label"] >= 0
    right = (cell["prediction"] == cell["label"]) & counted
    return pooled(right.sum(axis=1), counted.sum(axis=1))


def _flips(cell: Outcomes, reference: Outcomes) -> Sums:
    counted = cell["label"] >= 0
    moved = (cell["prediction"] != reference["prediction"]) & counted
    return pooled(moved.sum(axis=1), counted.sum(axis=1))


def _entity_f1(cell: Outcomes, _: Outcomes) -> Sums:
    features = np.stack([cell["hits"], cell["given"] + cell["wanted"]], axis=1).astype(np.float64)
    return Sums(features, lambda s: f1(s[..., :1], s[..., 1:]))
