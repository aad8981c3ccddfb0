"""Governance: who may approve what, and what that moves.

The rules are functions over the ledger and a decision; `review` and `rollback` enter what was
decided. Names are declared, not proven: MLflow and Prefect attest none. Where reviews are signed,
the key of the decision cannot sign its approval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from audit import ledger, lookup
from audit.evidence import NOTE, PREFIX
from audit.issuer import same_person
from audit.ledger import (
    CANDIDATE,
    CHAMPION,
    DECISION,
    PREVIOUS,
    REVIEW,
    ROLLBACK,
    Entry,
    Settings,
)
from audit.ledger_runs import LedgerWriter
from audit.models import aliases
from audit.note import sweep_note
from audit.reading import TrackingStore
from audit.signing import Signer
from audit.store import Store
from audit.trail import LONGEST_NOTE, connect
from audit.verify import finished_entries, require_intact
from halfstep.errors import Tampered, UserError, allowed

APPROVE, CONDITIONALLY, REFUSE = "approve", "approve with conditions", "refuse"
OUTCOMES = (APPROVE, CONDITIONALLY, REFUSE)
EXPIRY = "expiry"
"""What a waiver names that lets an expired decision be approved."""
LONGEST = 4000
"""Characters of a review: MLflow's tags and notes end at 8,000."""
DONE = {APPROVE: "approved", CONDITIONALLY: "approved with conditions", REFUSE: "refused"}


@dataclass(frozen=True)
class Review:
    """What a reviewer says."""

    outcome: str
    name: str
    role: str
    comment: str
    conditions: tuple[str, ...] = ()
    waivers: Mapping[str, str] = field(default_factory=dict)
    """Why, by the criterion's metric (or `EXPIRY`) that need not hold."""
    until: date | None = None
    """The last day of the approval; by default that of the decision."""

    def check(self) -> None:
        """Raises UserError where it does not say enough, too much, or contradicts itself."""
        if self.outcome not in OUTCOMES:
            raise UserError(
                f"review: outcome {self.outcome!r} is unknown; {allowed(self.outcome, OUTCOMES)}"
            )
        for what in ("name", "role", "comment"):
            if not getattr(self, what).strip():
                raise UserError(f"review: {what} is empty; a review says who, as what, and why")
        texts = (self.name, self.role, self.comment, *self.conditions, *self.waivers.values())
        if sum(map(len, texts)) > LONGEST:
            raise UserError(
                f"review: {sum(map(len, texts))} characters in all, at most {LONGEST} fit the "
                "tracking store; put the rest in a document and name it"
            )
        if (self.outcome == CONDITIONALLY) != bool(self.conditions):
            raise UserError(
                "review: approving with conditions needs at least one, and nothing else has any"
            )
        if self.outcome == REFUSE and (self.waivers or self.until):
            raise UserError("review: a refusal waives nothing and holds until nothing")

    @property
    def approves(self) -> bool:
        return self.outcome != REFUSE

    def to_json(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "name": self.name,
            "role": self.role,
            "comment": self.comment,
            "conditions": list(self.conditions),
            "waivers": dict(self.waivers),
            "until": self.until.isoformat() if self.until else None,
        }


def read_waivers(texts: Sequence[str]) -> dict[str, str]:
    """Waivers from texts of the form ``METRIC: REASON``.

    Raises:
        UserError: one is not of that form.
    """
    found = {}
    for text in texts:
        name, colon, why = text.partition(":")
        if not (name.strip() and colon and why.strip()):
            raise UserError(
                f"review: waiver {text!r} is not of the form 'METRIC: REASON' (or "
                f"'{EXPIRY}: REASON')"
            )
        found[name.strip()] = why.strip()
    return found


@dataclass(frozen=True)
class Case:
    """What a review is about."""

    result: Mapping[str, Any]
    """The sweep's result (`flows.result`)."""
    decided: Entry
    entries: Sequence[Entry]
    source: TrackingStore
    """The store as it was read."""

    @property
    def what(self) -> Mapping[str, Any]:
        return self.decided.body["what"]  # type: ignore[no-any-return]

    @property
    def reviews(self) -> list[Entry]:
        """Of this decision, the latest last."""
        return [
            one
            for one in self.entries
            if one.kind == REVIEW and one.body["what"]["run_id"] == self.what["run_id"]
        ]

    @property
    def signed_off(self) -> list[str]:
        """What each review said, in words."""
        return [str(one.body["what"]["text"]) for one in self.reviews]

    @property
    def failed(self) -> dict[str, str]:
        """Verdicts of the criteria that did not pass on confirmation, by metric."""
        return {
            found["criterion"]["metric"]: found["verdict"]
            for cell in self.result["confirmation"]
            for found in cell["findings"]
            if found["verdict"] != "accept"
        }


def open_case(store: Store, sweep: str) -> Case:
    """The decision of a sweep, named by its id, the start of that, or its run.

    Raises:
        UserError: there is none, or the ledger does not vouch for it.
    """
    result = lookup.find(store, sweep)
    if "decision" not in result:
        raise UserError(
            f"{sweep} is a {result['kind']} of sweep {result['sweep_id']}: a review is of a whole "
            "sweep"
        )
    source = TrackingStore(store)
    entries = finished_entries(source)
    for one in entries:
        if one.kind == DECISION and one.body["what"]["run_id"] == result["run_id"]:
            return Case(result, one, entries, source)
    raise UserError(
        f"sweep {result['sweep_id']} is in no entry of the ledger; `halfstep verify` says more"
    )


def check(case: Case, review: Review, signer: Signer | None, today: date) -> date | None:
    """Whether a review may be entered; returns the last day of an approval.

    Raises:
        UserError: says which rule it breaks.
    """
    review.check()
    if not review.approves:
        return None
    what = case.what
    if same_person(review.name, what["author"]):
        raise UserError(
            f"review: {review.name} is the declared author of this decision and cannot approve it; "
            "another person can"
        )
    if signer is not None and signer.keyid == case.decided.signer:
        raise UserError(
            "review: this key signed the decision itself and cannot sign its approval; use the "
            "reviewer's own"
        )
    if what["model"] is None:
        raise UserError(
            f"review: sweep {what['sweep_id']} has no variant to approve: no cell went to "
            f"confirmation (verdict {what['verdict']}). Refuse it, or sweep again with other "
            "schemes, criteria or more examples"
        )
    needed, expires = dict(case.failed), date.fromisoformat(what["expires"])
    if expires < today:
        needed[EXPIRY] = f"expired on {expires}"
    for name, state in needed.items():
        if name not in review.waivers:
            raise UserError(
                f"review: {name} did not pass ({state}); approve with --waive '{name}: REASON' and "
                "--until DATE, refuse, or sweep again"
            )
    unknown = [name for name in review.waivers if name not in needed]
    if unknown:
        raise UserError(
            f"review: there is nothing to waive of {', '.join(unknown)}; "
            f"{allowed(unknown[0], needed) if needed else 'everything passed'}"
        )
    if needed and review.until is None:
        raise UserError("review: a waiver needs its last day, --until YYYY-MM-DD")
    until = review.until or expires
    if until < today:
        raise UserError(f"review: {until} is past; an approval holds until a day to come")
    if until > expires and EXPIRY not in review.waivers:
        raise UserError(f"review: the decision itself expires on {expires}, before {until}")
    return until


def review(
    store: Store, sweep: str, said: Review, signer: Signer | None, today: date | None = None
) -> Entry:
    """Enters a review and moves the aliases where it approves. The caller holds the store.

    Raises:
        Tampered: an approval of evidence that is not as it was recorded.
        UserError: a rule forbids it.
    """
    case = open_case(store, sweep)
    until = check(case, said, signer, today or datetime.now(UTC).date())
    run_id, model = case.what["run_id"], case.what["model"]
    if said.approves:
        require_intact(case.source, run_id, "review")
    client = connect(store)
    text = f"{DONE[said.outcome]} by {said.name} ({said.role})"
    texts = case.signed_off
    last = f"{text} on {_today(today)}" + (f", until {until}" if until else "")
    detail = [last, said.comment, *(f"condition: {c}" for c in said.conditions)]
    detail += [f"waived {name}: {why}" for name, why in said.waivers.items()]
    texts.append("; ".join(detail))
    note = sweep_note(case.result, texts)[:LONGEST_NOTE]
    tags = {PREFIX + "signed_off": last}
    sets = Settings(runs={run_id: {**tags, NOTE: note}})
    if _latest_of_experiment(case):
        sets = sets.then(Settings(experiments={str(case.result["experiment_id"]): {NOTE: note}}))
    if model is not None:
        key = f"{model['name']}/{model['version']}"
        own = dict(tags) | ({PREFIX + "expires": until.isoformat()} if until else {})
        sets = sets.then(Settings(versions={key: {"tags": own}}))
        if said.approves:
            now = aliases(client, model["name"])
            sets = sets.then(Settings(aliases={model["name"]: _promoted(now, model["version"])}))
    what = {
        "sweep_id": case.what["sweep_id"],
        "run_id": run_id,
        "decision_digest": case.what["decision_digest"],
        "author": case.what["author"],
        "model": model,
        **said.to_json(),
        "until": until.isoformat() if until else None,
        "text": texts[-1],
    }
    shows = {
        "tags": {"sweep_id": case.what["sweep_id"], "outcome": said.outcome, "by": said.name,
                 "role": said.role, "cell": case.what["candidate"] or "none"},
        "note": f"**{case.what['candidate'] or 'No cell'}** of sweep {case.what['sweep_id']}: "
        f"{texts[-1]}.",
    }  # fmt: skip
    about = f"{case.result['experiment']} · {DONE[said.outcome]}"
    key = f"{case.what['sweep_id']}:{_events(case.entries, model, run_id)}"
    return LedgerWriter(store, client, signer).append(REVIEW, key, about, what, sets, shows)


def rollback(
    store: Store, name: str, by: str, role: str, comment: str, signer: Signer | None
) -> Entry:
    """Makes the champion's predecessor the champion again. The caller holds the store.

    Raises:
        UserError: there is nothing to go back to.
    """
    for what, text in (("name", by), ("role", role), ("comment", comment)):
        if not text.strip():
            raise UserError(f"rollback: {what} is empty; it says who, as what, and why")
    client = connect(store)
    now = aliases(client, name)
    entries = finished_entries(TrackingStore(store))
    known = {model for one in entries for model in one.settings.aliases}
    if name not in known:
        raise UserError(
            f"rollback: no model {name!r} in the ledger; {allowed(name, sorted(known))}"
        )
    champions = history(entries, name)
    if len(champions) < 2:
        held = f"version {champions[0]}" if champions else "no version"
        raise UserError(f"rollback: {name} has no previous champion to go back to (now: {held})")
    gone, back = champions[-1], champions[-2]
    before = champions[-3] if len(champions) > 2 else None
    if now.get(CHAMPION) != gone:
        raise Tampered(
            f"rollback: champion of {name} is version {now.get(CHAMPION)}, by the ledger {gone}; "
            "`halfstep verify` says more"
        )
    text = f"rolled back by {by} ({role}) on {_today()}"
    tags = {PREFIX + "signed_off": text}
    held_by = ledger.replay(entries).versions[f"{name}/{gone}"]["run_id"]
    case = open_case(store, held_by)
    texts = [*case.signed_off, f"{text}; {comment}"]
    sets = Settings(
        runs={held_by: {**tags, NOTE: sweep_note(case.result, texts)[:LONGEST_NOTE]}},
        versions={f"{name}/{gone}": {"tags": dict(tags)}},
        aliases={name: {CHAMPION: back, PREVIOUS: before}},
    )
    what = {"model": name, "from": gone, "to": back, "name": by, "role": role, "comment": comment,
            "run_id_of": held_by}  # fmt: skip
    shows = {
        "tags": {"outcome": "rollback", "by": by, "role": role},
        "note": f"Champion of **{name}** is version {back} again, not {gone}: {text}; {comment}.",
    }
    key = f"{name}:{len(entries)}"
    about = f"{name} · version {gone} to {back}"
    return LedgerWriter(store, client, signer).append(ROLLBACK, key, about, what, sets, shows)


def history(entries: Sequence[Entry], name: str) -> list[str]:
    """The champions of a model that a rollback could return to, the present one last."""
    champions: list[str] = []
    for one in entries:
        moved = one.settings.aliases.get(name, {})
        if one.kind == ROLLBACK and CHAMPION in moved:
            champions.pop()
        elif moved.get(CHAMPION) and champions[-1:] != [moved[CHAMPION]]:
            champions.append(str(moved[CHAMPION]))
    return champions


def _promoted(now: Mapping[str, str], version: str) -> dict[str, str | None]:
    moved: dict[str, str | None] = {CHAMPION: version}
    champion = now.get(CHAMPION)
    if champion is not None and champion != version:
        moved[PREVIOUS] = champion
    if now.get(CANDIDATE) == version:
        moved[CANDIDATE] = None
    return moved


def _latest_of_experiment(case: Case) -> bool:
    """Whether the experiment's note is this sweep's."""
    same = [
        one
        for one in case.entries
        if one.kind == DECISION and one.body["what"]["experiment"] == case.what["experiment"]
    ]
    return same[-1] == case.decided


def _events(entries: Sequence[Entry], model: Mapping[str, Any] | None, run_id: str) -> int:
    """How much was decided by people so far on a sweep or its model: makes each review its own."""
    name = model["name"] if model else None
    return sum(
        (one.kind == REVIEW and one.body["what"]["run_id"] == run_id)
        or (one.kind == ROLLBACK and one.body["what"]["model"] == name)
        for one in entries
    )  # fmt: skip


def _today(today: date | None = None) -> str:
    return (today or datetime.now(UTC).date()).isoformat()
