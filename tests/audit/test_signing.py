"""Signatures: whose they are, what they cover, and that keys stay where they are."""

import base64
import json
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_public_key,
)

from audit import signing
from halfstep.errors import UserError

SUBJECT = {"entry.json": "ab" * 32}


@pytest.fixture
def key(tmp_path):
    signing.make_key(tmp_path / "key", None)
    return tmp_path / "key"


def signed(key, subject=SUBJECT):
    return signing.envelope(signing.signer(key), subject, signing.ENTRY_TYPE, {"kind": "review"})


def test_the_envelope_is_what_the_specification_says(key):
    """Checked by hand, without the library that wrote it: DSSE 1.0's PAE and plain Ed25519."""
    found = json.loads(signed(key))
    payload = base64.b64decode(found["payload"])
    kind = found["payloadType"].encode()
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    public = load_pem_public_key((key.parent / "key.pub").read_bytes())
    assert isinstance(public, Ed25519PublicKey)
    public.verify(base64.b64decode(found["signatures"][0]["sig"]), pae)
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "entry.json", "digest": {"sha256": "ab" * 32}}]


def test_a_signature_counts_for_its_key_and_its_files_only(key, tmp_path):
    data, trusted = signed(key), signing.trusted_keys([key.parent / "key.pub"])
    assert signing.signed_by(data, SUBJECT, trusted) == signing.signer(key).keyid
    other = signing.trusted_keys([signing.make_key(tmp_path / "other", None)])
    with pytest.raises(ValueError, match="no key that is trusted"):
        signing.signed_by(data, SUBJECT, other)
    for subject in ({"entry.json": "ac" * 32}, {"other.json": "ab" * 32}, {}):
        with pytest.raises(ValueError, match="about other files"):
            signing.signed_by(data, subject, trusted)
    envelope = json.loads(data)
    payload = base64.b64decode(envelope["payload"]).replace(b"ab", b"ac")
    envelope["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(ValueError, match="changed after signing"):
        signing.signed_by(json.dumps(envelope).encode(), {"entry.json": "ac" * 32}, trusted)
    for junk in (b"", b"{}", b"[]", b"\xff"):
        with pytest.raises(ValueError, match=r"DSSE|decode|Expecting"):
            signing.signed_by(junk, SUBJECT, trusted)


def test_a_new_key_is_private_and_overwrites_nothing(key):
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="exists already"):
        signing.make_key(key, None)
    key.unlink()
    with pytest.raises(UserError, match=r"key\.pub exists already"):
        signing.make_key(key, None)


def test_an_encrypted_key_needs_its_password(tmp_path, monkeypatch):
    signing.make_key(tmp_path / "key", "secret")
    with pytest.raises(UserError, match="HALFSTEP_SIGNING_PASSWORD"):
        signing.signer(tmp_path / "key")
    monkeypatch.setenv(signing.PASSWORD_VARIABLE, "wrong")
    with pytest.raises(UserError, match="password"):
        signing.signer(tmp_path / "key")
    monkeypatch.setenv(signing.PASSWORD_VARIABLE, "secret")
    assert signing.signer(tmp_path / "key").keyid


def test_other_keys_and_other_files_are_refused_by_name(tmp_path):
    other = generate_private_key(SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    (tmp_path / "ec").write_bytes(other)
    with pytest.raises(UserError, match="not an Ed25519 key"):
        signing.signer(tmp_path / "ec")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="not a private key in PEM form"):
        signing.signer(tmp_path / "text")
    with pytest.raises(UserError, match="No such file"):
        signing.signer(tmp_path / "none")
    with pytest.raises(UserError, match="not an Ed25519 public key"):
        signing.trusted_keys([tmp_path / "text"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*\.pub or \*\.pem file"):
        signing.trusted_keys([tmp_path / "empty"])
    assert signing.signer(None) is None
