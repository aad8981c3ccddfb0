"""Texts to tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from halfstep.errors import UserError
from sources.prepared import Row
from sources.processors import tokenizer, tokenizer_digest
from sources.transforms.base import CHUNK, Chunk, Made, Target


def named_tokenizer(path: str | None) -> Any:
    """The tokenizer that a config names; the subject's own has been filled in by now."""
    if path is None:
        raise UserError(
            "the data's text needs a tokenizer, and the subject has none of its own; name one with "
            "tokenizer: PATH"
        )
    return tokenizer(path)


CUT = "texts cut at max_length"


class Tokenizing:
    """Has a tokenizer: its own, or the subject's."""

    tokenizer: str | None
    processor: ClassVar[str] = "tokenizer"
    """The field that the subject fills where a config does not."""

    @cached_property
    def loaded(self) -> Any:
        return named_tokenizer(self.tokenizer)

    @property
    def identity(self) -> dict[str, object]:
        return {"tokenizer": tokenizer_digest(self.loaded)}

    def encoded(self, texts: list[Any], seconds: list[Any] | None, **options: Any) -> Any:
        return self.loaded(
            texts, *([seconds] if seconds is not None else []), truncation=True, **options
        )


def tensors(encoded: Any, i: int) -> dict[str, np.ndarray]:
    """Row i of what a tokenizer returned, int64."""
    return {
        name: np.array(values[i], dtype=np.int64)
        for name, values in encoded.items()
        if name in ("input_ids", "attention_mask", "token_type_ids")
    }


def truncated(encoded: Any) -> int:
    """How many texts were longer than allowed."""
    return sum(bool(e.overflowing) for e in (encoded.encodings or []))


def tokenized(
    made: Tokenizing, texts: list[str], max_length: int
) -> Iterator[tuple[dict[str, np.ndarray], bool]]:
    """Each text's tokens, and whether it was cut."""
    for start in range(0, len(texts), CHUNK):
        encoded = made.encoded(texts[start : start + CHUNK], None, max_length=max_length)
        told = encoded.encodings  # which tokenizers written in Python do not have
        for i in range(len(encoded["input_ids"])):
            yield tensors(encoded, i), bool(told and told[i].overflowing)


@dataclass(frozen=True)
class Text(Tokenizing):
    """One text column, or two: as the two rows of a pair, or ``together`` in one sequence.

    Nothing is padded: batches hold texts of one length. ``pad_to`` is for models that were made for
    a fixed length.
    """

    columns: tuple[str, ...]
    together: bool = False
    tokenizer: str | None = None
    max_length: int = 256
    pad_to: int | None = None

    def __post_init__(self) -> None:
        if len(self.columns) not in (1, 2):
            raise UserError(f"text.columns: one or two columns, not {list(self.columns)}")

    def rows(self, chunk: Chunk, targets: list[Any], target: Target, told: dict[str, int]) -> Made:
        options: dict[str, Any] = {"max_length": self.pad_to or self.max_length}
        if self.pad_to:
            options["padding"] = "max_length"
        texts = [list(chunk[name]) for name in self.columns]
        usable = [
            i for i in range(len(targets)) if all(isinstance(t[i], str) and t[i] for t in texts)
        ]
        if usable:
            kept = [[t[i] for i in usable] for t in texts]
            if self.together and len(kept) == 2:
                encoded = [self.encoded(kept[0], kept[1], **options)]
            else:
                encoded = [self.encoded(t, None, **options) for t in kept]
            told[CUT] += sum(map(truncated, encoded))
            for place, i in enumerate(usable):
                yield i, Row([tensors(e, place) for e in encoded], target(targets[i]))
        for i in set(range(len(targets))) - set(usable):
            yield i, "no text"


@dataclass(frozen=True)
class Words(Tokenizing):
    """A column of lists of words; the target is a list of labels, one a word. A word's label goes
    to its first token; the others are not scored."""

    column: str
    tokenizer: str | None = None
    max_length: int = 256

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def rows(self, chunk: Chunk, targets: list[Any], target: Target, told: dict[str, int]) -> Made:
        for i, words in enumerate(chunk[self.column]):
            if not words or len(words) != len(targets[i]):
                yield i, f"{len(words or [])} words and {len(targets[i])} labels"
                continue
            encoded = self.encoded(
                [list(words)], None, max_length=self.max_length, is_split_into_words=True
            )
            told[CUT] += truncated(encoded)
            labels = np.array([target(label) for label in targets[i]])
            found, before = [], None
            for word in encoded.word_ids(0):
                found.append(int(labels[word]) if word is not None and word != before else -100)
                before = word
            yield i, Row([tensors(encoded, 0)], np.array(found, dtype=np.int64))
