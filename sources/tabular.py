"""Data in tables of rows and columns, and how a config says to make examples of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.digest import digest_code, digest_json
from halfstep.errors import UserError, allowed
from sources.arrays import carve
from sources.context import Context, Pools
from sources.prepared import Row, Writer, making, read
from sources.transforms import (
    Arrays,
    Audio,
    Image,
    Language,
    Search,
    Text,
    Transform,
    Values,
    Words,
)
from sources.transforms.base import Chunk, Table, Target, chunks, numbered
from sources.transforms.language import BYTES, DOCUMENT, DOCUMENTS
from sources.transforms.text import CUT, tensors, tokenized, truncated

KINDS = ("text", "words", "language", "search", "image", "audio", "values", "arrays")
Carved = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Tabular:
    """What every table can be asked for: one transform, the target, and what to keep beside it."""

    text: Text | None = None
    words: Words | None = None
    language: Language | None = None
    search: Search | None = None
    image: Image | None = None
    audio: Audio | None = None
    values: Values | None = None
    arrays: Arrays | None = None

    label: str | None = None
    """The column that the evaluator compares with; None where it needs none."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of the model's answers, where labels are texts."""
    keep: tuple[str, ...] = ()
    """Columns for slices and clusters; those that a config's criteria name are added."""
    carve: dict[str, int] | None = None
    """Pools to deal out of ``train``, by their sizes: {validation: 500, test: 500}."""
    seed: int = 0
    """Of the dealing."""

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise UserError(
                f"data: exactly one of {', '.join(KINDS)} says how rows become inputs; "
                f"{'both ' + ' and '.join(given) if given else 'none is'} given"
            )

    @property
    def transform(self) -> Transform:
        return next(filter(None, (getattr(self, kind) for kind in KINDS)))  # type: ignore[no-any-return]

    @property
    def made(self) -> tuple[str, ...]:
        """Columns that the transform makes itself."""
        return (DOCUMENT, BYTES) if self.language is not None else ()

    def for_subject(self, processor: str | None) -> Tabular:
        """With the subject's own tokenizer or processor where the config names none."""
        transform = self.transform
        name = getattr(transform, "processor", None)
        if name is None or processor is None or getattr(transform, name) is not None:
            return self
        return self._with(replace(transform, **{name: processor}))

    def keeping(self, columns: Sequence[str]) -> Tabular:
        """With more columns kept."""
        return replace(self, keep=tuple(dict.fromkeys((*self.keep, *columns))))

    def _with(self, transform: Transform) -> Tabular:
        kind = next(kind for kind in KINDS if getattr(self, kind) is not None)
        return replace(self, **{kind: transform})

    def pools(
        self, tables: Mapping[str, Table], identity: Mapping[str, object], context: Context
    ) -> Pools:
        """Examples by pool: prepared once, and read back from the cache after that.

        ``identity``: by pool, what tells the content of its table from any other's.
        """
        self._check_columns(tables)
        source = self
        if isinstance(self.values, Values):
            source = self._with(self.values.fitted(tables))
        if isinstance(source.transform, Search):
            pools = source._searched(tables, identity, context)
        else:
            pools = {
                name: read(source._prepared(name, table, identity[name], context))
                for name, table in tables.items()
            }
        return self.carved(pools)

    def carved(self, pools: Pools) -> Pools:
        """The pools, with those that ``carve`` names dealt out of ``train``."""
        if not self.carve:
            return pools
        taken = [name for name in self.carve if name in pools]
        if "train" not in pools or taken:
            why = f"there is a pool {taken[0]!r} already" if taken else "there is no pool 'train'"
            raise UserError(f"data.carve: {why}; the data has {sorted(pools)}")
        rest = {name: pool for name, pool in pools.items() if name != "train"}
        return rest | carve(pools["train"], self.carve, rest="train", seed=self.seed)

    def _check_columns(self, tables: Mapping[str, Table]) -> None:
        wanted = [*self.transform.columns, *filter(None, [self.label]), *self.keep]
        for pool, table in tables.items():
            for column in wanted:
                if column not in table.column_names and column not in self.made:
                    raise UserError(
                        f"pool {pool!r} has no column {column!r}; "
                        f"{allowed(column, table.column_names)}"
                    )

    def _key(self, identity: object) -> str:
        transform = self.transform
        return digest_json(
            {
                "transform": type(transform).__name__,
                "settings": asdict(transform),
                **transform.identity,
                "label": [self.label, list(self.classes or [])],
                "keep": list(self.keep),
                "identity": identity,
                "code": digest_code([Path(__file__).parent]),
            }
        )

    def _prepared(self, name: str, table: Table, identity: object, context: Context) -> Path:
        transform = self.transform
        assert not isinstance(transform, Search)
        folder = context.cache / "data" / self._key(identity)
        if folder.exists():
            return folder
        target = self._target(name)
        told: Counter[str] = Counter()
        with making(folder) as partial:
            writer = Writer(partial)
            for start, chunk in numbered(table):
                count = len(next(iter(chunk.values())))
                targets = list(chunk[self.label]) if self.label else [0] * count
                for i, made in self._rows(transform, chunk, targets, target, told):
                    if isinstance(made, str):
                        writer.unusable.append(f"row {start + i} of pool {name!r}: {made}")
                    else:
                        kept = {k: _scalar(chunk[k][i]) for k in self.keep if k in chunk}
                        writer.add(replace(made, columns={**made.columns, **kept}))
            writer.told = {what: count for what, count in told.items() if what != DOCUMENTS}
            writer.finish()
        return folder

    def _rows(
        self, transform: Any, chunk: Chunk, targets: list[Any], target: Target, told: Counter[str]
    ) -> list[tuple[int, Row | str]]:
        """What becomes of each row of a chunk; a target that is none makes its row unusable."""
        missing = [i for i, value in enumerate(targets) if value is None]
        kept = [i for i in range(len(targets)) if targets[i] is not None]
        some = {k: [v[i] for i in kept] for k, v in chunk.items()} if missing else chunk
        made = list(transform.rows(some, [targets[i] for i in kept], target, told))
        found = [(kept[i], row) for i, row in made]
        found += [(i, f"{self.label} is missing") for i in missing]
        return sorted(found, key=lambda item: item[0])

    def _target(self, pool: str) -> Target:
        """How a cell of the label column becomes what evaluators take."""
        numbers = {name: i for i, name in enumerate(self.classes or ())}

        def target(value: Any) -> np.ndarray:
            if isinstance(value, str):
                if value not in numbers:
                    hint = (
                        allowed(value, numbers)
                        if numbers
                        else "give classes: [...], in the order of the model's answers"
                    )
                    raise UserError(f"pool {pool!r}: {self.label} is {value!r}; {hint}")
                value = numbers[value]
            found = np.asarray(value)
            if found.dtype.kind in "biu":
                return found.astype(np.int64)
            if found.dtype.kind == "f":
                return found.astype(np.float32)
            raise UserError(
                f"pool {pool!r}: {self.label} is {type(value).__name__} {str(value)[:60]!r}; "
                "numbers, lists of numbers or texts named in classes are expected"
            )

        return target

    def _searched(
        self, tables: Mapping[str, Table], identity: Mapping[str, object], context: Context
    ) -> Pools:
        """Queries by pool, over the documents of all pools."""
        search = self.transform
        assert isinstance(search, Search)
        key = self._key(dict(identity))
        folders = {name: context.cache / "data" / f"{key[:48]}-{name}" for name in tables}
        if not all(folder.exists() for folder in folders.values()):
            documents: dict[str, int] = {}
            for table in tables.values():
                for chunk in chunks(table):
                    for text in chunk[search.document]:
                        if text:
                            documents.setdefault(text, len(documents))
            shared = list(tokenized(search, list(documents), search.max_length))
            for name, table in tables.items():
                if not folders[name].exists():
                    self._write_queries(name, table, search, documents, shared, folders[name])
        return {name: read(folder) for name, folder in folders.items()}

    def _write_queries(
        self,
        name: str,
        table: Table,
        search: Search,
        documents: Mapping[str, int],
        shared: Sequence[tuple[dict[str, np.ndarray], bool]],
        folder: Path,
    ) -> None:
        with making(folder) as partial:
            writer = Writer(partial)
            cut = sum(short for _, short in shared)
            for start, chunk in numbered(table):
                queries, found = list(chunk[search.query]), list(chunk[search.document])
                usable = [i for i in range(len(queries)) if queries[i] and found[i]]
                encoded = search.encoded(
                    [queries[i] for i in usable], None, max_length=search.max_length
                )
                cut += truncated(encoded)
                for place, i in enumerate(usable):
                    relevant = np.array([[documents[found[i]], 1.0]], dtype=np.float32)
                    kept = {k: _scalar(chunk[k][i]) for k in self.keep}
                    writer.add(Row([tensors(encoded, place)], relevant, kept))
                for i in set(range(len(queries))) - set(usable):
                    writer.unusable.append(f"row {start + i} of pool {name!r}: no text")
            for row, _ in shared:
                writer.share(row)
            writer.told = {CUT: cut}
            writer.finish()


def _scalar(value: Any) -> Any:
    """A value as JSON keeps it; a missing one is a slice of its own."""
    return value if isinstance(value, str | int | float | bool) else str(value)
