"""From untyped YAML values to typed ones; errors name the key, the value and the way out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from halfstep.errors import UserError, allowed

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, which YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; raises UserError if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"; {allowed(str(path), near)}" if near else ""
        raise UserError(f"config {path} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from error
    try:
        value = yaml.load(text, _StrictLoader)
    except UserError as error:
        raise UserError(f"config {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(
            f"config {path} is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(value, Mapping):
        raise UserError(f"config {path} holds {type(value).__name__}, not a mapping of keys")
    return value


def mapping(value: object, where: str, keys: Iterable[str]) -> Mapping[str, Any]:
    """``value`` as a mapping that holds only ``keys``."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a mapping, got {value!r}")
    known = list(keys)
    for key in value:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; {allowed(key, known)}")
    return value


def required(value: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in value:
        raise UserError(f"{where}: key {key!r} is missing")
    return value[key]


def build(cls: type[T], value: object, where: str) -> T:
    """A frozen dataclass from a mapping: unknown, missing and mistyped keys are refused."""
    known = fields(cls)  # type: ignore[arg-type]
    given = mapping(value, where, [f.name for f in known])
    for field in known:
        if field.default is MISSING and field.default_factory is MISSING:
            required(given, field.name, where)
    hints = get_type_hints(cls)
    typed = {key: _field(hints[key], item, f"{where}.{key}") for key, item in given.items()}
    return cls(**typed)


def _field(hint: Any, value: object, where: str) -> Any:
    """One field: a dataclass inside a dataclass is built the same way."""
    inner = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
    if inner is not None and isinstance(value, Mapping):
        return build(inner, value, where)  # type: ignore[arg-type]
    return typed_value(hint, value, where)


def typed_value(kind: Any, value: object, where: str) -> Any:
    """``value`` if it has the type; nothing is converted but int to float, and lists to tuples."""
    given = _tuples(value) if "tuple" in str(kind) else value
    try:
        return TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(given)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UserError(f"{where}: {value!r} is not allowed: {message}") from None


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def one_of(value: object, choices: Iterable[str], where: str, what: str) -> str:
    """``value`` if it is one of some names."""
    names = list(choices)
    if value not in names:
        raise UserError(f"{where}: unknown {what} {value!r}; {allowed(value, names)}")
    return str(value)


def number(value: object, where: str, low: float, high: float) -> float:
    """A number strictly above ``low`` and up to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        raise UserError(f"{where}: {value!r} is not allowed: a number above {low:g} up to {high:g}")
    return float(value)


def whole(value: object, where: str, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{where}: {value!r} is not allowed: a whole number of at least {low}")
    return value
