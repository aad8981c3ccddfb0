"""Evidence: what a finished run holds, item by item, so that a later change can be named.

MLflow lets anyone edit a finished run. `evidence.json`, written when a run is closed, says what was
recorded; the parent's evidence holds the digests of its children's, and the ledger that of the
parent's. Nothing here knows MLflow: what was recorded and what is found are both a `Snapshot`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from halfstep.digest import digest_bytes

EVIDENCE = "evidence.json"
SCHEMA = "halfstep-evidence/1"
PREFIX = "halfstep."
NOTE = "mlflow.note.content"
PARENT = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
DELETED = "deleted"

Point = tuple[float, int, int]
"""A metric's value, its time in milliseconds since the epoch, its step."""


@dataclass
class Snapshot:
    """One run of the tracking store, as far as halfstep answers for it."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    started: int
    """Milliseconds since the epoch."""
    ended: int | None
    tags: dict[str, str] = field(default_factory=dict)
    """Those of ours (see `ours`)."""
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    """Every value of each."""
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Datasets: name, digest, source, profile, tags."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """SHA-256 by path, `EVIDENCE` left out."""
    shown: dict[str, Point] = field(default_factory=dict)
    """The metrics as tables show them: MLflow keeps these apart from the history."""

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["shown"]
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Snapshot:
        metrics = {
            name: [(float(value), int(at), int(step)) for value, at, step in points]
            for name, points in found["metrics"].items()
        }
        return cls(**{**found, "metrics": metrics})


def ours(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that halfstep answers for; everybody may set others."""
    return {k: v for k, v in tags.items() if k.startswith(PREFIX) or k in (NOTE, PARENT, RUN_NAME)}


def evidence_bytes(recorded: Snapshot, children: Mapping[str, str]) -> bytes:
    """The document of a run. ``children``: the digest of each child's document by its run id."""
    body = {"schema": SCHEMA, **recorded.to_json(), "children": dict(sorted(children.items()))}
    return canonical(body)


def canonical(value: object) -> bytes:
    """JSON whose bytes are the same wherever they are made: sorted keys, no NaN."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode()


def read_evidence(data: bytes) -> tuple[Snapshot, dict[str, str]]:
    """What was recorded, and the digests of the children's evidence.

    Raises:
        ValueError: the bytes are no such document.
    """
    try:
        found = json.loads(data)
        if found.pop("schema") != SCHEMA:
            raise ValueError("unknown schema")
        children = found.pop("children")
        return Snapshot.from_json(found), children
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an evidence document ({error})") from error


def differences(recorded: Snapshot, found: Snapshot) -> list[str]:
    """Every item of a run that is not as it was recorded, in words."""
    return [
        *_of_run(recorded, found),
        *_of_values("tag", recorded.tags, found.tags),
        *_of_values("param", recorded.params, found.params),
        *_of_metrics(recorded, found),
        *_of_inputs(recorded.inputs, found.inputs),
        *_of_artifacts(recorded.artifacts, found.artifacts),
    ]


def _of_run(recorded: Snapshot, found: Snapshot) -> Iterator[str]:
    names = {"name": "its name", "status": "its status", "started": "its start time",
             "ended": "its end time", "experiment_id": "its experiment"}  # fmt: skip
    for name, text in names.items():
        was, now = getattr(recorded, name), getattr(found, name)
        if was != now:
            yield f"{text} is {now!r}, recorded as {was!r}"


def _of_values(kind: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*recorded, *found}):
        if name not in found:
            yield f"{kind} {name} is gone, recorded as {_short(recorded[name])}"
        elif name not in recorded:
            yield f"{kind} {name} was added: {_short(found[name])}"
        elif recorded[name] != found[name]:
            yield f"{kind} {name} is {_short(found[name])}, recorded as {_short(recorded[name])}"


def _of_metrics(recorded: Snapshot, found: Snapshot) -> Iterator[str]:
    for name in sorted({*recorded.metrics, *found.metrics, *found.shown}):
        was, now = recorded.metrics.get(name), found.metrics.get(name, [])
        if was is None:
            yield f"metric {name} was added: {_points(now or [found.shown[name]])}"
        elif was != now:
            yield f"metric {name} is {_points(now)}, recorded as {_points(was)}"
        elif found.shown.get(name) != was[-1]:
            seen = [found.shown[name]] if name in found.shown else []
            yield f"metric {name} is shown as {_points(seen)}, recorded as {_points(was)}"


def _points(points: Sequence[Point]) -> str:
    if not points:
        return "gone"
    return ", ".join(f"{value!r} (at {at}, step {step})" for value, at, step in points)


def _of_inputs(recorded: Sequence[Any], found: Sequence[Any]) -> Iterator[str]:
    was = {item["name"]: item for item in recorded}
    now = {item["name"]: item for item in found}
    for name in sorted({*was, *now}):
        if name not in now:
            yield f"dataset {name} is gone"
        elif name not in was:
            yield f"dataset {name} was added"
        elif was[name] != now[name]:
            changed = [key for key in was[name] if was[name][key] != now[name].get(key)]
            yield f"dataset {name} has another {', '.join(changed) or 'content'}"


def _of_artifacts(recorded: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    for path in sorted({*recorded, *found}):
        if path not in found:
            yield f"artifact {path} is gone"
        elif path not in recorded:
            yield f"artifact {path} was added"
        elif recorded[path] != found[path]:
            yield (
                f"artifact {path} was changed: SHA-256 {found[path][:16]}…, recorded as "
                f"{recorded[path][:16]}…"
            )


def _short(text: str) -> str:
    """A value on one line; of a long one its start and its digest."""
    if len(text) <= 80:
        return repr(text)
    return f"{text[:40]!r}… ({len(text)} characters, SHA-256 {digest_bytes(text.encode())[:16]}…)"
