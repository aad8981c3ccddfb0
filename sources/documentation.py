"""Real English text that is there wherever halfstep is: the documentation of its own libraries.

Nothing is downloaded, and the pinned versions make it the same text everywhere.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfstep.digest import digest_code, digest_json
from halfstep.errors import UserError, allowed
from sources.context import Context, Pools
from sources.prepared import making
from sources.tabular import Tabular

PACKAGES = {"sklearn": "scikit-learn", "scipy": "scipy", "numpy": "numpy", "mlflow": "mlflow"}
"""Import name to distribution."""
SHORTEST, LONGEST = 120, 1200
"""Characters of a description."""


@dataclass(frozen=True)
class Entry:
    """What a function's or class's docstring says."""

    name: str
    module: str
    package: str
    summary: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Documentation(Tabular):
    """``rows`` says what a row is:

    - ``search``: ``summary`` (the first sentence of an object's documentation) and ``description``
      (what follows it): which description belongs to a summary?
    - ``similar``: ``first`` and ``second``, summaries or descriptions, and their ``similarity``:
      3 of one object, 2 of one module, 1 of one package, 0 of two packages
    - ``duplicates``: ``first`` and ``second``, and whether the second is a ``duplicate`` of the
      first: the same description with words left out, swapped and misspelt; or else another one of
      the same module
    - ``documents``: ``text``, all descriptions of one module

    Every row has ``package``. Pools: ``train``, ``validation`` and ``test``, dealt by object (by
    module for ``documents``), so that no text stands in two of them.
    """

    rows: str
    packages: tuple[str, ...] = ("sklearn", "scipy", "numpy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows not in _ROWS:
            raise UserError(f"data.rows: unknown {self.rows!r}; {allowed(self.rows, _ROWS)}")
        for name in self.packages:
            if name not in PACKAGES:
                raise UserError(f"data.packages: unknown {name!r}; {allowed(name, PACKAGES)}")

    def load(self, context: Context) -> Pools:
        import datasets

        versions = {name: version(PACKAGES[name]) for name in self.packages}
        key = digest_json(
            {"versions": versions, "rows": self.rows, "code": digest_code([Path(__file__).parent])}
        )
        folder = context.cache / "documentation" / key
        if not folder.exists():
            with making(folder) as partial:
                entries = sorted(collected(self.packages), key=lambda e: e.name)
                for pool, rows in _dealt(entries, self.rows).items():
                    (partial / f"{pool}.json").write_text(json.dumps(rows))
        tables = {
            path.stem: datasets.Dataset.from_list(json.loads(path.read_text()))
            for path in sorted(folder.glob("*.json"))
        }
        identity = {name: f"{key} {name}" for name in tables}
        return self.pools(tables, identity, context)


def collected(packages: tuple[str, ...]) -> Iterator[Entry]:
    """Every documented public function and class, read from the sources without importing them."""
    seen: set[str] = set()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"data.packages: {package} is not installed")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if {"tests", "test", "externals", "vendor"} & set(parts):
                continue
            module = ".".join((package, *(p for p in parts if p != "__init__")))
            for entry in _documented(path, module, package):
                # Many objects say the same in other capitals; a tokenizer may not tell them apart.
                said = {_letters(entry.summary), _letters(entry.description)}
                if not said & seen:
                    seen |= said
                    yield entry


def _documented(path: Path, module: str, package: str) -> Iterator[Entry]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node) or ""
        summary, _, rest = text.partition("\n\n")
        # numpydoc: sections have a title underlined with dashes; what comes before is prose.
        section = re.compile(r"\n[A-Z][A-Za-z ]+\n-{3,}")
        prose = section.split(f"\n{rest}")[0]
        notes = re.split(r"\nNotes\n-{3,}\n", f"\n{rest}")
        if len(notes) > 1:
            prose += "\n" + section.split(notes[1])[0]
        summary, prose = _plain(summary), _plain(prose)[:LONGEST]
        if 20 <= len(summary) <= 300 and len(prose) >= SHORTEST:
            yield Entry(f"{module}.{node.name}", module, package, summary, prose)


def _letters(text: str) -> str:
    """What tells two texts apart though a tokenizer lowers them and cuts them short."""
    return re.sub(r"\W+", "", text.casefold())[:120]


def _plain(text: str) -> str:
    """One line, without the markup of reStructuredText."""
    text = re.sub(r"\.\. \w[\w-]*::[^\n]*", " ", text)
    text = re.sub(r":\w+:`~?([^`<]*)(<[^>]*>)?`", r"\1", text)
    return " ".join(text.replace("``", "").replace("`", "").split())


def _dealt(entries: list[Entry], rows: str) -> dict[str, list[dict[str, Any]]]:
    """A quarter of the objects train, the rest validates and tests; rows are made inside a pool."""
    generator = random.Random(20261123)
    units: list[list[Entry]] = [[entry] for entry in entries]
    if rows == "documents":
        modules: dict[str, list[Entry]] = {}
        for entry in entries:
            modules.setdefault(entry.module, []).append(entry)
        units = list(modules.values())
    generator.shuffle(units)
    ends = (0, len(units) // 4, len(units) * 5 // 8, len(units))
    return {
        pool: _ROWS[rows]([e for unit in units[ends[i] : ends[i + 1]] for e in unit], generator)
        for i, pool in enumerate(("train", "validation", "test"))
    }


def _search(entries: list[Entry], generator: random.Random) -> list[dict[str, Any]]:
    return [
        {"summary": e.summary, "description": e.description, "package": e.package} for e in entries
    ]


def _others(entries: list[Entry], key: str) -> Mapping[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(getattr(entry, key), []).append(entry)
    return found


def _similar(entries: list[Entry], generator: random.Random) -> list[dict[str, Any]]:
    modules, packages = _others(entries, "module"), _others(entries, "package")
    rows = []
    for i, entry in enumerate(entries):
        grade = 3 - i % 4
        if grade == 3:
            rows.append((entry, entry.summary, entry.description, 3))
            continue
        choices = {
            2: [e for e in modules[entry.module] if e is not entry],
            1: [e for e in packages[entry.package] if e.module != entry.module],
            0: [e for e in entries if e.package != entry.package],
        }[grade]
        if choices:
            other = generator.choice(choices)
            rows.append((entry, entry.summary, other.summary, grade))
    return [
        {"first": a, "second": b, "similarity": float(grade), "package": entry.package}
        for entry, a, b, grade in rows
    ]


def _duplicates(entries: list[Entry], generator: random.Random) -> list[dict[str, Any]]:
    modules = _others(entries, "module")
    rows = []
    for i, entry in enumerate(entries):
        if i % 2:
            second = _edited(entry.description, generator)
        else:
            near = [e for e in modules[entry.module] if e is not entry]
            second = generator.choice(near or [e for e in entries if e is not entry]).description
        rows.append(
            {"first": entry.description, "second": second, "duplicate": i % 2,
             "package": entry.package}
        )  # fmt: skip
    return rows


def _edited(text: str, generator: random.Random) -> str:
    """A fifth of the words left out, some swapped, some misspelt."""
    words = [word for word in text.split() if generator.random() > 0.2]
    for i in range(len(words) - 1):
        if generator.random() < 0.1:
            words[i], words[i + 1] = words[i + 1], words[i]
        if generator.random() < 0.1 and len(words[i]) > 3:
            at = generator.randrange(len(words[i]) - 1)
            words[i] = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
    return " ".join(words)


def _documents(entries: list[Entry], generator: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "text": "\n\n".join(f"{e.summary} {e.description}" for e in found),
            "module": module,
            "package": found[0].package,
        }
        for module, found in _others(entries, "module").items()
    ]


_ROWS = {
    "search": _search,
    "similar": _similar,
    "duplicates": _duplicates,
    "documents": _documents,
}
