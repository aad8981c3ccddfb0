"""Language modelling: how well a model foretells tokens, how far it moved from the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from evaluators import paired
from evaluators.evaluator import Evaluator, Progress, named, run_rows, silent, table, tensor_of
from evaluators.metric import Metric, Outcomes, Sums
from evaluators.statistics import pooled, quantile, transformed
from halfstep.errors import UserError
from halfstep.examples import Examples

WANTED = "logits [batch, tokens, vocabulary]"
BYTES = "bytes"
"""The column that says how many bytes of text an example's scored tokens stand for."""


@dataclass(frozen=True)
class LanguageModelling(Evaluator):
    """Examples are blocks of tokens; the target at a position is the token that the model's logits
    there should foretell (the next one for causal models, the hidden one for masked ones);
    negative targets are not scored.

    Perplexity ``exp(mean nll)``; bits per byte (Gao et al., "The Pile", 2020), to compare across
    tokenizers; KL(reference || cell) a token, its mean and 99th percentile; agreement of the most
    probable token. The divergence is that of the distributions over the reference's ``kept`` most
    probable tokens and one bin for the rest: never above the full one (data processing inequality),
    and exact where the vocabulary is no larger. Blocks of one document are one cluster.
    """

    kept: int = 32

    headline: ClassVar[str] = "perplexity"
    closeness: ClassVar[str] = "kl_mean"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return METRICS

    def check(self, pool: str, examples: Examples) -> None:
        super().check(pool, examples)
        for i in range(len(examples)):
            if not bool((examples.targets.row(i) >= 0).any()):
                raise UserError(f"{pool}: example {i} has no token to score")

    def run(
        self,
        model: nn.Module,
        examples: Examples,
        batch_size: int,
        progress: Progress = silent,
        reference: Outcomes | None = None,
    ) -> Outcomes:
        def read(returned: Any, batch: Any, which: Any) -> dict[str, np.ndarray]:
            log_p = torch.log_softmax(tensor_of(returned, 3, WANTED).float(), dim=-1)
            target = examples.targets.rows(which).long()
            if target.shape != log_p.shape[:2]:
                raise UserError(
                    f"expected logits for the {target.shape[1]} tokens of each block; the model "
                    f"returned {list(log_p.shape)}"
                )
            if int(target.max()) >= log_p.shape[2]:
                raise UserError(
                    f"the data holds token {int(target.max())}, the model knows {log_p.shape[2]}: "
                    "the tokenizer does not fit the model"
                )
            return self._read(log_p, target, which, reference)

        found = run_rows(model, examples.inputs, batch_size, read, progress)
        if BYTES in examples.columns:
            found[BYTES] = examples.columns[BYTES].astype(np.float64)
        return table(found, ~np.isinf(found["nll"]).any(axis=1))

    def _read(
        self, log_p: Tensor, target: Tensor, which: Any, reference: Outcomes | None
    ) -> dict[str, np.ndarray]:
        counted = target >= 0
        nll = -log_p.gather(2, target.clamp(min=0)[..., None])[..., 0]
        broken = counted & ~torch.isfinite(nll)  # infinite, so that NaN can mean: not scored
        nll = torch.where(broken, torch.inf, torch.where(counted, nll, torch.nan))
        top = torch.where(counted, log_p.argmax(dim=-1), -1)
        found = {"nll": nll.numpy(), "top": top.to(torch.int32).numpy()}
        if reference is None:
            value, index = log_p.topk(min(self.kept, log_p.shape[2]), dim=-1)
            return {
                **found,
                "kept": index.to(torch.int32).numpy(),
                "kept_log_p": value.numpy(),
                "kl": torch.where(counted, 0.0, torch.nan).numpy(),
            }
        width = log_p.shape[1]
        index = torch.from_numpy(reference["kept"][which, :width]).long()
        p = torch.from_numpy(reference["kept_log_p"][which, :width]).double()
        kl = _coarse_divergence(p, log_p.gather(2, index).double(), log_p.shape[2])
        return {**found, "kl": torch.where(counted, kl, torch.nan).float().numpy()}


def _coarse_divergence(p: Tensor, q: Tensor, vocabulary: int) -> Tensor:
    """KL(p || q) over some tokens and one bin for all others, from log-probabilities
    ``[…, kept]``."""
    found = (p.exp() * (p - q)).sum(-1)
    if p.shape[-1] < vocabulary:
        rest_p, rest_q = ((1 - x.exp().sum(-1)).clamp(min=1e-12) for x in (p, q))
        found = found + rest_p * (rest_p.log() - rest_q.log())
    return found.clamp(min=0.0)


def _nll(cell: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """Summed over each example's scored tokens, and how many they are."""
    values = cell["nll"].astype(np.float64)
    counted = np.isfinite(values)
    return np.where(counted, values, 0.0).sum(axis=1), counted.sum(axis=1).astype(np.float64)


def _perplexity(cell: Outcomes, _: Outcomes) -> Sums:
    return transformed(pooled(*_nll(cell)), np.exp)


def _bits_per_byte(cell: Outcomes, _: Outcomes) -> Sums:
    total = _nll(cell)[0]
    size = cell[BYTES] if BYTES in cell else np.full(len(cell), np.nan)
    return transformed(pooled(total, size), lambda nats: nats / np.log(2))


def _kl_mean(cell: Outcomes, _: Outcomes) -> Sums:
    values = cell["kl"].astype(np.float64)
    counted = np.isfinite(values)
    return pooled(np.where(counted, values, 0.0).sum(axis=1), counted.sum(axis=1))


def _kl_p99(cell: Outcomes, _: Outcomes) -> Sums:
    """Over all tokens at once. A quantile of tokens, not of blocks: reported, not tested."""
    values = cell["kl"].astype(np.float64)
    found = float(quantile(values[np.isfinite(values)], 0.99).of(
        np.ones((1, int(np.isfinite(values).sum()))))[0])  # fmt: skip
    return Sums(np.ones((len(cell), 1)), lambda sums: np.full(sums.shape[:-1], found))


def _agreement(cell: Outcomes, reference: Outcomes) -> Sums:
    counted = reference["top"] >= 0
    same = (cell["top"] == reference["top"]) & counted
    return pooled(same.sum(axis=1), counted.sum(axis=1))


METRICS = named(
    Metric("perplexity", False, _perplexity, paired.bootstrap, share=False),
    Metric("bits_per_byte", False, _bits_per_byte, paired.bootstrap, share=False),
    Metric("kl_mean", False, _kl_mean, paired.bootstrap, share=False),
    Metric("kl_p99", False, _kl_p99, share=False),
    Metric("top1_agreement", True, _agreement, paired.bootstrap),
)
