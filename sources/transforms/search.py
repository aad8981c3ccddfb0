"""Queries and the documents that they search."""

from __future__ import annotations

from dataclasses import dataclass

from sources.transforms.text import Tokenizing


@dataclass(frozen=True)
class Search(Tokenizing):
    """Each row holds a query and its document. Every query searches the documents of all rows of
    all pools; rows with equal documents share it."""

    query: str
    document: str
    tokenizer: str | None = None
    max_length: int = 256

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.query, self.document)
