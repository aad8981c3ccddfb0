"""The ledger: a chain of entries over everything that was decided; each holds the digest of the
one before it.

An entry is a JSON document, kept as a run of its own in the experiment `EXPERIMENT`. Besides what
happened it says what it set elsewhere: tags of runs and experiments, versions and aliases of
models. So what the store ought to hold today follows from replaying the ledger (`Settings`), and a
later edit shows. Where two machines append at once the chain forks, and the next entry holds the
digests of both: nothing is lost, and no lock on the server is needed.

Nothing here knows MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from audit.evidence import NOTE, PREFIX, RUN_NAME, canonical
from halfstep.digest import digest_bytes

EXPERIMENT = "halfstep ledger"
SCHEMA = "halfstep-ledger/1"
ENTRY, ENVELOPE, PUBLIC_KEY = "entry.json", "attestation.dsse.json", "signer.pub.pem"
"""The files of an entry's run; the last two where it is signed."""
DECISION, ANALYSIS, REVIEW, ROLLBACK, REPRODUCTION, SUCCESSION, RETIREMENT = (
    "decision", "analysis", "review", "rollback", "reproduction", "succession", "retirement",
)  # fmt: skip
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
ALIASES = (CANDIDATE, CHAMPION, PREVIOUS)
"""Of a registered model: what a sweep proposes, what a review approved, what that replaced."""
KINDS = (DECISION, ANALYSIS, REVIEW, ROLLBACK, REPRODUCTION, SUCCESSION, RETIREMENT)


@dataclass
class Settings:
    """What an entry set, or, replayed, what the store ought to hold. Values of None: removed."""

    runs: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """Tags by run id."""
    experiments: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """Tags by experiment id."""
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Registered model versions by ``<name>/<version>``: model_id, files, tags."""
    aliases: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """Versions by alias, by model name."""

    def then(self, later: Settings) -> Settings:
        """After a later entry: what it names is replaced, the rest stays."""
        versions = {key: dict(value) for key, value in self.versions.items()}
        for key, value in later.versions.items():
            earlier = versions.get(key, {})
            tags = {**earlier.get("tags", {}), **value.get("tags", {})}
            versions[key] = {**earlier, **value, "tags": tags}
        return Settings(
            _over(self.runs, later.runs),
            _over(self.experiments, later.experiments),
            versions,
            _over(self.aliases, later.aliases),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "experiments": self.experiments,
            "versions": self.versions,
            "aliases": self.aliases,
        }


def _over(
    earlier: Mapping[str, Mapping[str, str | None]], later: Mapping[str, Mapping[str, str | None]]
) -> dict[str, dict[str, str | None]]:
    return {
        key: {**earlier.get(key, {}), **later.get(key, {})}
        for key in dict.fromkeys([*earlier, *later])
    }


@dataclass(frozen=True)
class Entry:
    """One entry as it is kept."""

    body: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest_bytes(self.data)

    @property
    def data(self) -> bytes:
        return canonical(self.body)

    @property
    def number(self) -> int:
        """Its place in the chain, from 1; two may share one where the chain forked."""
        return int(self.body["number"])

    @property
    def previous(self) -> tuple[str, ...]:
        return tuple(self.body["previous"])

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def settings(self) -> Settings:
        return Settings(**self.body["sets"])

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.number} · {self.kind} · {self.body['about']}"

    @property
    def signer(self) -> str | None:
        """The id of the key that it was signed with."""
        return self.body["signer"]  # type: ignore[no-any-return]

    @property
    def tags(self) -> dict[str, str]:
        """What its run in MLflow shows."""
        shows = self.body["shows"]
        own = {"kind": "ledger", "record": self.record, "entry": str(self.number),
               "digest": self.digest}  # fmt: skip
        return {
            **{PREFIX + name: value for name, value in {**shows["tags"], **own}.items()},
            NOTE: shows["note"],
            RUN_NAME: self.name,
        }

    @property
    def record(self) -> str:
        return record_of(self.kind, str(self.body["key"]))

    @property
    def at(self) -> int:
        """Milliseconds since the epoch."""
        return round(datetime.fromisoformat(self.body["at"]).timestamp() * 1000)


def record_of(kind: str, key: str) -> str:
    """The tag by which an event's entry is found."""
    return f"ledger:{kind}:{key}"


@dataclass(frozen=True)
class Place:
    """Where the next entry goes: after which ones."""

    number: int
    previous: tuple[str, ...]


START = Place(1, ())


def entry(
    place: Place,
    kind: str,
    key: str,
    about: str,
    what: Mapping[str, Any],
    sets: Settings,
    shows: Mapping[str, Any],
    signer: str | None,
) -> Entry:
    """An entry, made now.

    Args:
        key: names the event, so that it is entered once.
        about: what it is about in a few words: the experiment and the sweep, or the model.
        what: its own facts: digests, verdict, who signed off, why.
        shows: ``tags`` and ``note`` that its run in MLflow shows.
        signer: the id of the key that signs it; None where nobody does.
    """
    body = {
        "schema": SCHEMA,
        "number": place.number,
        "previous": list(place.previous),
        "kind": kind,
        "about": about,
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "key": key,
        "signer": signer,
        "what": dict(what),
        "sets": sets.to_json(),
        "shows": dict(shows),
    }
    return Entry(body)


def read_entry(data: bytes) -> Entry:
    """The entry in a file.

    Raises:
        ValueError: it is none, or not written as entries are.
    """
    try:
        found = Entry(json.loads(data))
        if found.body["schema"] != SCHEMA or found.kind not in KINDS or found.data != data:
            raise ValueError("not written as entries are")
        _ = found.number, found.previous, found.settings, found.at, found.tags, found.signer
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a ledger entry ({error})") from error
    return found


def heads(entries: Iterable[Entry]) -> tuple[str, ...]:
    """The digests that no entry holds yet: one, but where the chain forked."""
    found = list(entries)
    held = {digest for one in found for digest in one.previous}
    return tuple(sorted(one.digest for one in found if one.digest not in held))


def after(entries: Sequence[Entry]) -> Place:
    """Where the next one goes."""
    return Place(max((one.number for one in entries), default=0) + 1, heads(entries))


def chain_faults(entries: Sequence[Entry], head: Iterable[str] | None) -> list[str]:
    """What is wrong with the chain itself, in words.

    Args:
        head: the digests that the store names as the chain's end; None where it names none.
    """
    by_digest = {one.digest: one for one in entries}
    faults = []
    for one in entries:
        for digest in one.previous:
            before = by_digest.get(digest)
            if before is None:
                faults.append(
                    f"entry {one.name}: the one before it (digest {digest[:16]}…) is missing or "
                    "was changed"
                )
            elif before.number >= one.number:
                faults.append(f"entry {one.name} stands before {before.name}, which it follows")
        if not one.previous and one.number != 1:
            faults.append(f"entry {one.name} follows nothing")
    numbers = {one.number for one in entries}
    faults += [
        f"entry number {n} is missing"
        for n in range(1, max(numbers, default=0))
        if n not in numbers
    ]
    named, found = set(head or ()), set(heads(entries))
    for digest in sorted(named - found):
        known = by_digest.get(digest)
        what = f"entry {known.name}, which others follow" if known else f"digest {digest[:16]}…"
        faults.append(f"the ledger's head names {what}, and that is not the chain's end")
    faults += [
        f"entry {by_digest[digest].name} is not named by the ledger's head"
        for digest in sorted(found - named)
    ]
    return faults


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """As they follow each other; those of a fork by their time."""
    return sorted(entries, key=lambda one: (one.number, one.at, one.digest))


def replay(entries: Iterable[Entry]) -> Settings:
    """What the store ought to hold, after all entries in their order."""
    found = Settings()
    for one in in_order(entries):
        found = found.then(one.settings)
    return found


def head_text(number: int, digests: Sequence[str]) -> str:
    """A head as people write it down: ``<number>:<digest>`` (several joined by ``+``)."""
    return f"{number}:{'+'.join(digests)}"


def read_head(text: str) -> tuple[int, tuple[str, ...]]:
    """The number and the digests of a head that was written down.

    Raises:
        ValueError: it is not of that form.
    """
    number, _, digests = text.strip().partition(":")
    found = tuple(digests.split("+"))
    if not number.isdigit() or not all(
        len(d) == 64 and set(d) <= set("0123456789abcdef") for d in found
    ):
        raise ValueError(f"{text!r} is not of the form NUMBER:SHA256")
    return int(number), found
