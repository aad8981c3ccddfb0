"""Retrieval data in BEIR's layout: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/SPLIT.tsv``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.digest import digest_bytes, digest_code, digest_json
from halfstep.errors import UserError
from sources.context import Context, Pools
from sources.prepared import Row, Writer, making, read
from sources.tabular import Tabular
from sources.transforms import Text
from sources.transforms.text import CUT, tokenized


@dataclass(frozen=True, kw_only=True)
class Beir(Tabular):
    """Thakur et al., "BEIR: a heterogeneous benchmark", 2021. Pools: one for each file of
    ``qrels``, and ``documents``, whose examples are the documents themselves: for calibration. The
    transform is ``text``; its columns are ``text`` (with the title before it)."""

    path: str

    def load(self, context: Context) -> Pools:
        folder = Path(self.path).expanduser()
        files = [folder / "corpus.jsonl", folder / "queries.jsonl"]
        judged = sorted((folder / "qrels").glob("*.tsv"))
        for file in files:
            if not file.is_file():
                raise UserError(f"data.path: {file} does not exist; is {folder} in BEIR's layout?")
        if not judged:
            raise UserError(f"data.path: {folder / 'qrels'} holds no .tsv file")
        if self.text is None:
            raise UserError("beir data takes the transform text")
        transform = self.text
        key = digest_json(
            {
                "settings": asdict(transform),
                **transform.identity,
                "files": {f.name: digest_bytes(f.read_bytes()) for f in (*files, *judged)},
                "code": digest_code([Path(__file__).parent]),
            }
        )
        made = context.cache / "data" / key
        names = [file.stem for file in judged]
        if not made.exists():
            with making(made) as partial:
                self._write(partial, transform, files, judged)
        pools = {name: read(made / name) for name in (*names, "documents")}
        return self.carved(pools)

    def _write(self, folder: Path, transform: Text, files: list[Path], judged: list[Path]) -> None:
        documents = {
            row["_id"]: f"{row.get('title') or ''} {row['text']}".strip()
            for row in _lines(files[0])
        }
        queries = {row["_id"]: row["text"] for row in _lines(files[1])}
        numbers = {name: i for i, name in enumerate(documents)}
        length = transform.max_length
        encoded = list(tokenized(transform, list(documents.values()), length))
        for file in judged:
            (folder / file.stem).mkdir()
            writer = Writer(folder / file.stem)
            relevant = _judgements(file)
            for query, found in relevant.items():
                gains = [(numbers[d], gain) for d, gain in found.items() if d in numbers]
                if query not in queries or not any(gain > 0 for _, gain in gains):
                    writer.unusable.append(f"query {query} of {file.name}: nothing is relevant")
                    continue
                row = next(tokenized(transform, [queries[query]], length))[0]
                writer.add(Row([row], np.array(gains, dtype=np.float32), {"query": query}))
            for row, _ in encoded:
                writer.share(row)
            writer.told = {CUT: sum(count for _, count in encoded)}
            writer.finish()
        (folder / "documents").mkdir()
        writer = Writer(folder / "documents")
        for row, _ in encoded:
            writer.add(Row([row], np.array(0)))
        writer.finish()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    yield {"_id": row["_id"], "text": row["text"], "title": row.get("title")}
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: no _id and text ({error})") from None


def _judgements(path: Path) -> dict[str, dict[str, float]]:
    """Gains of documents by query."""
    found: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t"), 1):
            if number == 1 and row[:1] == ["query-id"]:
                continue
            try:
                query, document, gain = row[0], row[1], float(row[2])
            except (IndexError, ValueError):
                raise UserError(
                    f"{path}, line {number}: query, document and gain expected"
                ) from None
            found.setdefault(query, {})[document] = gain
    return found
