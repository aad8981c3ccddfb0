"""Signatures: in-toto statements in DSSE envelopes, by an Ed25519 key of the team's own.

The envelope, its encoding and the keys are securesystemslib's, the statement in-toto's. A signature
says who vouches for the digests in a statement; the ledger says that nothing was changed since.
Specifications: https://github.com/secure-systems-lab/dsse (protocol 1.0), in-toto Statement v1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from halfstep.errors import UserError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
ENTRY_TYPE = "urn:halfstep:ledger-entry:v1"
PACK_TYPE = "urn:halfstep:evidence-pack:v1"
KEY_VARIABLE = "HALFSTEP_SIGNING_KEY"
PASSWORD_VARIABLE = "HALFSTEP_SIGNING_PASSWORD"


@dataclass(frozen=True, eq=False)
class Signer:
    """A private key; it stays in memory."""

    signer: CryptoSigner
    public_pem: bytes

    @property
    def keyid(self) -> str:
        """SHA-256 of the public key as securesystemslib computes it."""
        return str(self.signer.public_key.keyid)


def signer(path: Path | None) -> Signer | None:
    """The key at ``path``, or at the one that `KEY_VARIABLE` names; None where neither is given.

    Raises:
        UserError: it cannot be read, or is no Ed25519 key.
    """
    place = path or (Path(os.environ[KEY_VARIABLE]) if os.environ.get(KEY_VARIABLE) else None)
    if place is None:
        return None
    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        key = load_pem_private_key(place.read_bytes(), password.encode() if password else None)
    except OSError as error:
        raise UserError(f"signing key {place}: {error.strerror}") from error
    except TypeError as error:  # encrypted and no password, or the other way round
        raise UserError(
            f"signing key {place}: {error}; {PASSWORD_VARIABLE} holds the password of an encrypted "
            "one"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"signing key {place} is not a private key in PEM form, or the password in "
            f"{PASSWORD_VARIABLE} is not its own; make one with: halfstep keygen FILE"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"signing key {place} is not an Ed25519 key ({type(key).__name__})")
    return Signer(CryptoSigner(key), _public_pem(key))


def make_key(path: Path, password: str | None) -> Path:
    """Writes a new private key, and its public half beside it as ``<path>.pub``; returns that.

    Raises:
        UserError: one of the files is there already, or cannot be written.
    """
    public = path.with_name(path.name + ".pub")
    for place in (path, public):
        if place.exists():
            raise UserError(f"{place} exists already; a key is never overwritten")
    key = Ed25519PrivateKey.generate()
    secret = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
        public.write_bytes(_public_pem(key))
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from error
    return public


def _public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def trusted_keys(places: Iterable[Path]) -> list[SSlibKey]:
    """Public keys from PEM files, or from folders of ``*.pub`` and ``*.pem`` files.

    Raises:
        UserError: a file holds no Ed25519 public key, or a folder none at all.
    """
    keys = []
    for place in places:
        files = [place]
        if place.is_dir():
            files = sorted([*place.glob("*.pub"), *place.glob("*.pem")])
            if not files:
                raise UserError(f"trusted keys {place}: the folder holds no *.pub or *.pem file")
        keys += [_public(file) for file in files]
    return keys


def _public(place: Path) -> SSlibKey:
    try:
        return _key(place.read_bytes())
    except OSError as error:
        raise UserError(f"trusted key {place}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"trusted key {place} is not an Ed25519 public key in PEM form") from error


def _key(pem: bytes) -> SSlibKey:
    try:
        key = load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError("unknown kind of key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not an Ed25519 key")
    return SSlibKey.from_crypto(key)


def envelope(
    by: Signer, subjects: Mapping[str, str], predicate_type: str, predicate: Mapping[str, Any]
) -> bytes:
    """A signed statement about files.

    Args:
        subjects: SHA-256 by name.
        predicate: what is said of them, for readers; what counts are the digests.
    """
    statement = Statement(
        [ResourceDescriptor(name, digest={"sha256": sha}).pb for name, sha in subjects.items()],
        predicate_type,
        dict(predicate),
    )
    statement.validate()
    made = Envelope(MessageToJson(statement.pb).encode(), PAYLOAD_TYPE, {})
    made.sign(by.signer)
    return (json.dumps(made.to_dict(), indent=1) + "\n").encode()


def signed_by(
    data: bytes, subjects: Mapping[str, str], keys: Sequence[Key], own: bytes | None = None
) -> str:
    """The id of the key that signed a statement about exactly these files.

    Args:
        keys: the public keys that count. Where there are none, ``own``, the key that came with the
            envelope, is taken: that shows that nothing was changed, not who signed.

    Raises:
        ValueError: says what is wrong with the envelope.
    """
    if not keys:
        if own is None:
            raise ValueError("no public key to check the signature with")
        keys = [_key(own)]
    try:
        found = Envelope.from_dict(json.loads(data))
        accepted = found.verify(list(keys), 1)
    except VerificationError as error:
        raise ValueError("signed by no key that is trusted, or changed after signing") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a DSSE envelope ({error})") from error
    try:
        statement = Parse(found.payload, Statement([], "", {}).pb)
    except ParseError as error:
        raise ValueError("the envelope holds no in-toto statement") from error
    said = {subject.name: subject.digest.get("sha256") for subject in statement.subject}
    if found.payload_type != PAYLOAD_TYPE or said != dict(subjects):
        raise ValueError("the signature is about other files than these")
    return str(next(iter(accepted)))


def is_key(pem: bytes, keyid: str) -> bool:
    """Whether a public key is the one of that id."""
    try:
        return bool(_key(pem).keyid == keyid)
    except ValueError:
        return False
