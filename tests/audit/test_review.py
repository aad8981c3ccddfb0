"""Governance: who may approve what, what that moves, and that refusing moves nothing."""

import shutil
from datetime import date, timedelta

import pytest
from mlflow.tracking import MlflowClient
from recorded import small_sweep

from audit import signing
from audit.issuer import Issuer
from audit.lookup import find, sweep_run
from audit.models import aliases
from audit.reading import TrackingStore
from audit.review import (
    Review,
    history,
    open_case,
    read_waivers,
    review,
    rollback,
)
from audit.store import Store
from audit.verify import finished_entries, verify
from halfstep.errors import Tampered, UserError

JANE = {"name": "Jane Doe", "role": "Head of ML", "comment": "margins are kept"}


def undecidable(config):
    """Accepted on selection, but not to be confirmed: too few examples for the margin."""
    config["name"] = "doubtful"
    config["tasks"][0]["splits"]["confirmation"] = {"from": "test", "samples": 20}
    config["matrix"]["weights"]["format"] = "int8"


def hopeless(config):
    config["name"] = "hopeless"
    config["matrix"]["weights"]["format"] = "int2"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("governed")
    store = Store(folder / "mlruns")
    signing.make_key(folder / "author.key", None)
    author = Issuer("Ada Author", signing.signer(folder / "author.key"))
    results = {
        "good": small_sweep(folder, store, issuer=author),
        "again": small_sweep(folder, store, issuer=author, fresh=True),
        "doubtful": small_sweep(folder, store, undecidable, issuer=author),
        "hopeless": small_sweep(folder, store, hopeless, issuer=author),
    }
    return folder, store, {name: result["sweep_id"] for name, result in results.items()}


@pytest.fixture
def governed(written, tmp_path):
    """A copy of the store, and the sweeps' ids."""
    folder, store, ids = written
    shutil.copytree(store.path, tmp_path / "mlruns")
    return Store(tmp_path / "mlruns"), ids, folder / "author.key"


def aliases_of(store, name="tiny"):
    return aliases(MlflowClient(store.tracking_uri), name)


def intact(store):
    return verify(TrackingStore(store)).findings == []


def test_a_confirmed_variant_is_the_candidate_and_approval_makes_it_the_champion(governed):
    store, ids, _ = governed
    assert aliases_of(store) == {"candidate": "2"}
    review(store, ids["good"], Review("approve", **JANE), None)
    assert aliases_of(store) == {"candidate": "2", "champion": "1"}
    review(store, ids["again"], Review("approve", **JANE), None)
    assert aliases_of(store) == {"champion": "2", "previous": "1"}
    assert intact(store)
    case = open_case(store, ids["again"])
    run = MlflowClient(store.tracking_uri).get_run(case.what["run_id"])
    assert run.data.tags["halfstep.signed_off"].startswith("approved by Jane Doe (Head of ML) on")
    assert "approved by Jane Doe" in run.data.tags["mlflow.note.content"]


def test_refusal_moves_nothing_and_says_so(governed):
    store, ids, _ = governed
    before = aliases_of(store)
    entry = review(store, ids["again"], Review("refuse", **JANE), None)
    assert aliases_of(store) == before
    assert entry.settings.aliases == {}
    assert intact(store)
    assert [one.body["what"]["outcome"] for one in open_case(store, ids["again"]).reviews] == [
        "refuse"
    ]


def test_conditions_are_in_the_trail(governed):
    store, ids, _ = governed
    said = Review("approve with conditions", **JANE, conditions=("monitor weekly",))
    review(store, ids["good"], said, None)
    version = MlflowClient(store.tracking_uri).get_model_version("tiny", "1")
    assert version.tags["halfstep.signed_off"].startswith("approved with conditions by Jane")
    note = open_case(store, ids["good"]).reviews[0].body["shows"]["note"]
    assert "condition: monitor weekly" in note


@pytest.mark.parametrize("name", ["Ada Author", "ada  author", " ADA AUTHOR "])
def test_the_declared_author_cannot_approve_but_can_refuse(governed, name):
    store, ids, _ = governed
    said = JANE | {"name": name}
    with pytest.raises(UserError, match="declared author of this decision and cannot approve"):
        review(store, ids["good"], Review("approve", **said), None)
    assert aliases_of(store) == {"candidate": "2"}
    review(store, ids["good"], Review("refuse", **said), None)


def test_the_key_that_signed_the_decision_cannot_sign_its_approval(governed, tmp_path):
    store, ids, author_key = governed
    with pytest.raises(UserError, match="this key signed the decision itself"):
        review(store, ids["good"], Review("approve", **JANE), signing.signer(author_key))
    public = signing.make_key(tmp_path / "jane.key", None)
    review(store, ids["good"], Review("approve", **JANE), signing.signer(tmp_path / "jane.key"))
    keys = signing.trusted_keys([public, author_key.with_name("author.key.pub")])
    report = verify(TrackingStore(store), trusted=keys)
    assert report.findings == []
    assert sorted(map(len, report.signed.values())) == [1, 4]


def test_what_did_not_pass_needs_a_waiver_with_an_end(governed):
    store, ids, _ = governed
    until = date.today() + timedelta(days=30)
    case = open_case(store, ids["doubtful"])
    assert case.what["verdict"] == "inconclusive"
    assert aliases_of(store, "doubtful") == {}, "nothing unconfirmed is a candidate"
    with pytest.raises(UserError, match=r"accuracy did not pass \(inconclusive\)"):
        review(store, ids["doubtful"], Review("approve", **JANE), None)
    waived = {"accuracy": "pilot of ten users"}
    with pytest.raises(UserError, match="a waiver needs its last day"):
        review(store, ids["doubtful"], Review("approve", **JANE, waivers=waived), None)
    said = Review("approve", **JANE, waivers=waived | {"speed": "x"}, until=until)
    with pytest.raises(UserError, match=r"nothing to waive of speed; allowed: accuracy"):
        review(store, ids["doubtful"], said, None)
    review(store, ids["doubtful"], Review("approve", **JANE, waivers=waived, until=until), None)
    assert aliases_of(store, "doubtful") == {"champion": "1"}
    version = MlflowClient(store.tracking_uri).get_model_version("doubtful", "1")
    assert version.tags["halfstep.expires"] == until.isoformat()
    assert intact(store)


def test_an_expired_decision_needs_a_waiver_too(governed):
    store, ids, _ = governed
    later = date.today() + timedelta(days=400)
    with pytest.raises(UserError, match="expiry did not pass"):
        review(store, ids["good"], Review("approve", **JANE), None, later)
    said = Review(
        "approve", **JANE, waivers={"expiry": "new sweep is under way"},
        until=later + timedelta(days=7),
    )  # fmt: skip
    review(store, ids["good"], said, None, later)
    assert aliases_of(store)["champion"] == "1"


def test_without_a_variant_there_is_nothing_to_approve(governed):
    store, ids, _ = governed
    with pytest.raises(UserError, match="no variant to approve: no cell went to confirmation"):
        review(store, ids["hopeless"], Review("approve", **JANE), None)
    review(store, ids["hopeless"], Review("refuse", **JANE), None)
    assert intact(store)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Review("maybe", **JANE), "outcome 'maybe' is unknown"),
        (Review("approve", " ", "x", "y"), "name is empty"),
        (Review("approve", "x", "", "y"), "role is empty"),
        (Review("approve", "x", "y", ""), "comment is empty"),
        (Review("approve with conditions", **JANE), "needs at least one"),
        (Review("approve", **JANE, conditions=("x",)), "nothing else has any"),
        (Review("refuse", **JANE, waivers={"accuracy": "x"}), "waives nothing"),
        (Review("approve", **JANE, until=date(2020, 1, 1)), "is past"),
        (Review("approve", **JANE, until=date(2999, 1, 1)), "decision itself expires on"),
    ],
)
def test_what_a_review_must_say(governed, said, message):
    store, ids, _ = governed
    with pytest.raises(UserError, match=message):
        review(store, ids["good"], said, None)
    assert len(finished_entries(TrackingStore(store))) == 4


def test_evidence_that_was_altered_is_not_approved(governed):
    store, ids, _ = governed
    run_id = open_case(store, ids["good"]).what["run_id"]
    MlflowClient(store.tracking_uri).set_tag(run_id, "halfstep.verdict", "reject")
    with pytest.raises(Tampered, match=r"tag halfstep\.verdict is 'reject', recorded as 'accept'"):
        review(store, ids["good"], Review("approve", **JANE), None)
    review(store, ids["good"], Review("refuse", **JANE), None)


def test_a_variant_that_was_altered_is_not_approved(governed):
    store, ids, _ = governed
    for path in store.artifacts.glob("tiny/models/*/artifacts/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Tampered, match=r"artifact model\.safetensors was changed"):
        review(store, ids["good"], Review("approve", **JANE), None)


def test_what_the_tracking_store_cannot_hold_is_refused(governed):
    store, ids, _ = governed
    said = JANE | {"comment": "x" * 5000}
    with pytest.raises(UserError, match="at most 4000 fit the tracking store"):
        review(store, ids["good"], Review("refuse", **said), None)
    review(store, ids["good"], Review("refuse", **JANE | {"comment": "ü" * 3900}), None)
    assert intact(store)


def test_the_ledgers_runs_can_be_shown_and_verified(governed):
    store, ids, _ = governed
    for name in ("good", "again"):
        review(store, ids[name], Review("approve", **JANE), None)
    rollback(store, "tiny", "Rob", "on call", "complaints", None)
    client = MlflowClient(store.tracking_uri)
    ledger = client.get_experiment_by_name("halfstep ledger").experiment_id
    for run in client.search_runs([ledger]):
        shown = find(store, run.info.run_id)
        assert shown["kind"] == "ledger"
        assert shown["note"]
        assert verify(TrackingStore(store), sweep_run(store, run.info.run_id)).findings == []


def test_rollback_goes_back_one_champion_at_a_time(governed):
    store, ids, _ = governed
    for name in ("good", "again"):
        review(store, ids[name], Review("approve", **JANE), None)
    rollback(store, "tiny", "Rob", "on call", "complaints", None)
    assert aliases_of(store) == {"champion": "1"}
    assert history(finished_entries(TrackingStore(store)), "tiny") == ["1"]
    version = MlflowClient(store.tracking_uri).get_model_version("tiny", "2")
    assert version.tags["halfstep.signed_off"].startswith("rolled back by Rob (on call) on")
    with pytest.raises(UserError, match="no previous champion to go back to"):
        rollback(store, "tiny", "Rob", "on call", "complaints", None)
    review(store, ids["again"], Review("approve", **JANE), None)
    assert aliases_of(store) == {"champion": "2", "previous": "1"}
    assert intact(store)


def test_rollback_of_what_is_not_there(governed):
    store, _, _ = governed
    with pytest.raises(UserError, match=r"no model 'tinny' in the ledger; allowed: tiny"):
        rollback(store, "tinny", "Rob", "on call", "complaints", None)
    with pytest.raises(UserError, match="comment is empty"):
        rollback(store, "tiny", "Rob", "on call", " ", None)
    with pytest.raises(UserError, match="no version"):
        rollback(store, "tiny", "Rob", "on call", "complaints", None)


def test_an_alias_that_somebody_moved_is_not_rolled_back_over(governed):
    store, ids, _ = governed
    for name in ("good", "again"):
        review(store, ids[name], Review("approve", **JANE), None)
    MlflowClient(store.tracking_uri).set_registered_model_alias("tiny", "champion", "1")
    with pytest.raises(Tampered, match="champion of tiny is version 1, by the ledger 2"):
        rollback(store, "tiny", "Rob", "on call", "complaints", None)


def test_waivers_are_read_as_they_are_written():
    assert read_waivers(["accuracy: pilot: ten users"]) == {"accuracy": "pilot: ten users"}
    for bad in ("accuracy", ": x", "accuracy:", ""):
        with pytest.raises(UserError, match="not of the form"):
            read_waivers([bad])
