"""A small causal language model over bytes, trained on the data's own training pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.errors import UserError
from halfstep.examples import POSITIONAL
from halfstep.subject import Subject
from sources.context import Context, Pools
from sources.training import Loss, train_pool, trained

VOCABULARY = 256


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised first and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Byte and position embeddings, blocks, and a head of its own."""

    def __init__(self, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 ``[batch, length]`` to logits of the next byte, ``[batch, length, 256]``."""
        x = self.bytes(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class SmallLm:
    """The recipe. Any change to it, to the data or to this code trains anew."""

    width: int = 96
    depth: int = 3
    heads: int = 4
    epochs: int = 6
    batch_size: int = 16
    learning_rate: float = 0.004
    seed: int = 0
    threads: int = 2

    def structure(self, pools: Pools, context: Context) -> nn.Module:
        """The model before training."""
        train = train_pool("small_lm", pools)
        column = train.inputs.columns.get(POSITIONAL)
        if column is None or len(column.shape) != 1 or column.dtype != torch.int64:
            raise UserError(
                f"small_lm takes blocks of bytes, one int64 tensor [n, length]; the data is "
                f"{train.inputs.described()}"
            )
        longest = column.shape[0] or int(column.lengths.max())
        return LanguageModel(longest, self.width, self.depth, self.heads).eval()

    def load(self, pools: Pools, context: Context) -> Subject:
        """The trained model, from the cache where it was trained before."""
        train = train_pool("small_lm", pools)
        tokens, targets = train.inputs.tensor, train.targets.all()

        def loss_of(model: nn.Module) -> Loss:
            def loss(index: Tensor, generator: torch.Generator) -> Tensor:
                said = model(tokens[index]).flatten(0, 1)
                return F.cross_entropy(said, targets[index].flatten(), ignore_index=-100)

            return loss

        return trained(
            "small_lm", self, lambda: self.structure(pools, context), loss_of, train, context
        )
