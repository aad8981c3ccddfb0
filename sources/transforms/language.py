"""Documents to blocks of tokens, for language models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from halfstep.errors import UserError
from halfstep.examples import POSITIONAL
from sources.prepared import Row
from sources.processors import tokenizer_digest
from sources.transforms.base import Chunk, Made, Target
from sources.transforms.text import Tokenizing, named_tokenizer

BYTES_TOKENIZER = "bytes"
DOCUMENT, BYTES = "document", "bytes"
DOCUMENTS = "documents"
"""How many there were so far."""
NOT_SCORED = -100


@dataclass(frozen=True)
class Language(Tokenizing):
    """A column of documents, cut into blocks of ``block`` tokens.

    Causal: a block's targets are the tokens that follow each of its own. With ``masked`` that share
    of positions is hidden (the same ones each time), and the targets are what stood there.
    ``tokenizer: bytes`` takes the text's UTF-8 bytes, for models that take one tensor of them.
    The end of a document that fills no block is left out, and said how much that is. The column
    ``document`` counts documents: it is what blocks cluster by.
    """

    CLUSTER: ClassVar[str] = DOCUMENT
    """What blocks come in groups of."""

    column: str
    block: int = 256
    tokenizer: str | None = None
    masked: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block < 2 or not 0 <= self.masked < 1:
            raise UserError("language: block is at least 2, and masked a share below 1")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @cached_property
    def loaded(self) -> Any:
        return None if self.tokenizer == BYTES_TOKENIZER else named_tokenizer(self.tokenizer)

    @property
    def identity(self) -> dict[str, object]:
        made = self.loaded
        return {"tokenizer": tokenizer_digest(made) if made is not None else BYTES_TOKENIZER}

    def rows(self, chunk: Chunk, targets: list[Any], target: Target, told: dict[str, int]) -> Made:
        for i, text in enumerate(chunk[self.column]):
            if not isinstance(text, str) or not text:
                yield i, "no text"
                continue
            ids, sizes = self._tokens(text)
            document = told[DOCUMENTS]
            told[DOCUMENTS] += 1
            step = self.block
            ahead = 0 if self.masked else 1
            whole = max(0, (len(ids) - ahead) // step)
            told["tokens at the ends of documents left out"] += len(ids) - whole * step
            for b in range(whole):
                part = slice(b * step, (b + 1) * step)
                for row in self._block(ids, sizes, part, document, b):
                    yield i, row

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and the bytes of text that each stands for."""
        made = self.loaded
        if made is None:
            ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
            return ids, np.ones(len(ids), dtype=np.int64)
        found = made(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        sizes = [len(text[a:b].encode()) for a, b in found["offset_mapping"]]
        return np.array(found["input_ids"], dtype=np.int64), np.array(sizes, dtype=np.int64)

    def _block(
        self, ids: np.ndarray, sizes: np.ndarray, part: slice, document: int, number: int
    ) -> Iterator[Row]:
        if self.masked:
            generator = np.random.default_rng([self.seed, document, number])
            hidden = generator.random(self.block) < self.masked
            if not hidden.any():
                hidden[0] = True
            inputs = np.where(hidden, self.loaded.mask_token_id, ids[part])
            targets = np.where(hidden, ids[part], NOT_SCORED)
            size = int(sizes[part][hidden].sum())
        else:
            ahead = slice(part.start + 1, part.stop + 1)
            inputs, targets, size = ids[part], ids[ahead], int(sizes[ahead].sum())
        given = {POSITIONAL: inputs}
        if self.loaded is not None:
            given = {"input_ids": inputs, "attention_mask": np.ones_like(inputs)}
        yield Row([given], targets.astype(np.int64), {DOCUMENT: document, BYTES: size})
