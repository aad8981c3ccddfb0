"""The evidence pack: it verifies where the store is not, and shows its gaps."""

import json
import random
import shutil
import subprocess

import forked
import pytest
from recorded import small_sweep

from audit import signing
from audit.issuer import Issuer
from audit.mapping import GAP, POINTS
from audit.pack import export, verify_pack
from audit.review import Review, review
from audit.store import Store
from halfstep.errors import Tampered, UserError

JANE = {"name": "Jane Doe", "role": "Head of ML", "comment": "margins are kept"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two sweeps, the first approved, its pack signed; the store is gone."""
    folder = tmp_path_factory.mktemp("packed")
    store = Store(folder / "mlruns")
    public = signing.make_key(folder / "key", None)
    signer = signing.signer(folder / "key")
    result = small_sweep(folder, store, issuer=Issuer("Ada Author", signer))
    review(store, result["sweep_id"], Review("approve", **JANE), None)
    small_sweep(folder, store, issuer=Issuer("Ada Author", signer), fresh=True)
    told = export(store, result["sweep_id"], folder / "pack", signer)
    store.path.rename(folder / "gone")
    return folder / "pack", result, public, told


@pytest.fixture
def pack(packed, tmp_path):
    shutil.copytree(packed[0], tmp_path / "pack")
    return tmp_path / "pack"


def test_it_verifies_without_the_store(pack, packed):
    report = verify_pack(pack, signing.trusted_keys([packed[2]]))
    assert report.findings == []
    assert report.entries == 3
    assert report.runs == 7
    assert any("the pack is signed by key" in note for note in report.notes)


def test_it_verifies_from_the_command_line_of_a_machine_with_no_store(pack, tmp_path):
    done = forked.run("verify", pack, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["intact"]
    assert not (tmp_path / "mlruns").exists()
    (pack / "decision.md").write_text("fine")
    done = forked.run("verify", pack, "--json", cwd=tmp_path)
    assert done.returncode == 4
    assert "decision.md" in json.loads(done.stdout)["findings"][0]["where"]


def test_its_sums_are_those_of_sha256sum(pack):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=pack, check=False).returncode == 0


def test_every_single_change_to_a_file_is_found(pack):
    pick = random.Random(7)
    files = [p for p in sorted(pack.rglob("*")) if p.is_file()]
    for path in pick.sample(files, 40):
        kept = path.read_bytes()
        data = bytearray(kept)
        data[pick.randrange(len(data))] ^= 4
        path.write_bytes(data)
        if path.name == "head.json":
            try:
                found = verify_pack(pack).findings
            except UserError:
                found = ["no pack any more"]
        else:
            found = verify_pack(pack).findings
        assert found, path
        path.write_bytes(kept)
    assert verify_pack(pack).findings == []


def test_sums_that_were_made_anew_do_not_help(pack):
    """Whoever changes a value and recomputes the sums meets the evidence; then the ledger."""
    run = next((pack / "runs").glob("*/run.json"))
    body = json.loads(run.read_text())
    body["params"]["threads"] = "8"
    run.write_text(json.dumps(body))
    remake_sums(pack)
    whats = [f.what for f in verify_pack(pack).findings]
    assert any("param threads" in what for what in whats)
    assert any("signature does not hold" in what for what in whats)


def remake_sums(pack):
    from audit.pack import SUMS, _sums

    (pack / SUMS).write_bytes(_sums(pack))


def test_a_signature_that_was_taken_away_is_missed_where_keys_are_trusted(pack, packed):
    (pack / "attestation.dsse.json").unlink()
    assert verify_pack(pack).findings == []
    assert "the pack itself is not signed" in verify_pack(pack).notes
    found = verify_pack(pack, signing.trusted_keys([packed[2]])).findings
    assert [f.what for f in found] == ["the pack itself is not signed"]


def test_what_it_holds(pack, packed):
    _, result, _, told = packed
    assert {p.name for p in pack.iterdir()} == {
        "README.md", "SHA256SUMS", "attestation.dsse.json", "decision.json", "decision.md",
        "decision.schema.json", "head.json", "ledger", "mapping.json", "mapping.md",
        "model-card.md", "report.html", "runs", "signer.pub.pem",
    }  # fmt: skip
    assert told["files"] == len((pack / "SHA256SUMS").read_text().splitlines())
    card = (pack / "model-card.md").read_text()
    assert result["decision"]["cell"] in card
    assert "approved by Jane Doe (Head of ML)" in card
    assert "Intended use" in card
    assert "To be filled in" in card


def test_the_mapping_shows_its_gaps(pack):
    points = json.loads((pack / "mapping.json").read_text())
    assert len(points) == len(POINTS)
    assert {p["framework"] for p in points} == {
        "EU AI Act, Annex IV (2)(g)", "NIST AI RMF, MEASURE", "Model risk (SR 11-7)"
    }  # fmt: skip
    state = {(p["framework"][:4], p["clause"]): p["state"] for p in points}
    assert state["EU A", "dated and signed"] == "covered"
    assert state["EU A", "discrimination"] == GAP, "no criterion by slice: not looked at"
    assert state["NIST", "1.3"] == "covered"
    assert state["Mode", "reproducibility"] == "partly", "nobody has run it again yet"
    text = (pack / "mapping.md").read_text()
    assert text.count("**GAP**") == sum(p["state"] == GAP for p in points) > 5


def test_a_store_that_was_altered_is_not_exported(tmp_path):
    from mlflow.tracking import MlflowClient

    store = Store(tmp_path / "mlruns")
    result = small_sweep(tmp_path, store)
    with pytest.raises(UserError, match="exists already"):
        export(store, "", tmp_path, None)
    MlflowClient(store.tracking_uri).log_metric(result["cells"][0]["run_id"], "accuracy", 1.0)
    with pytest.raises(Tampered, match="metric accuracy"):
        export(store, "", tmp_path / "pack", None)
    assert not (tmp_path / "pack").exists()
    assert not list(tmp_path.glob(".pack*"))
    with pytest.raises(UserError, match="not an evidence pack"):
        verify_pack(tmp_path)
