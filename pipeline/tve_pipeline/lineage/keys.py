"""Signatures of evidence: DSSE envelopes, Ed25519 keys (both securesystemslib's), and whom a repository trusts.

The private key is the file that `TVE_SIGNING_KEY` names, or one of the user's own, made on first use; `none` leaves
evidence unsigned. Public keys that a repository trusts are the files `keys/*.pub` in it, in PEM.
"""

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

SETTING = "TVE_SIGNING_KEY"
UNSIGNED = "none"
TRUSTED_FOLDER = Path("keys")
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
SHORT = 12  # digits by which messages name a key

Standing = Literal["trusted", "own", "untrusted", "unsigned", "altered"]


@dataclass(frozen=True, slots=True)
class Opened:
    """An envelope's statement and what its signature is worth."""

    statement: dict[str, Any]
    standing: Standing
    key: str  # the first digits of the key that signed, "" where none did


def own_key_file() -> Path | None:
    """The private key that signs here; None where `TVE_SIGNING_KEY` is "none"."""
    named = os.environ.get(SETTING, "")
    if named == UNSIGNED:
        return None
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "tve" / "signing_key.pem"


def own_signer(*, make: bool = True) -> CryptoSigner | None:
    """Who signs: the own key, which is made on first use with mode 0600; None where nothing shall be signed.

    Args:
        make: whether a key that does not exist is made; where not, None is returned for it too.

    Raises:
        ValueError: a key that others may read, or that is no Ed25519 key in PEM.
    """
    path = own_key_file()
    if path is None or (not make and not path.exists()):
        return None
    if not path.exists():
        _make(path)
    if os.name == "posix" and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise ValueError(f"{path}: expected a private key with mode 0600, got {mode:04o}; `chmod 600` it")
    try:
        signer = CryptoSigner(load_pem_private_key(path.read_bytes(), password=None))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected an Ed25519 private key in PEM, got {error}") from error
    if signer.public_key.keytype != "ed25519":
        raise ValueError(f"{path}: expected an Ed25519 private key, got one of type {signer.public_key.keytype}")
    return signer


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = CryptoSigner.generate_ed25519().private_bytes
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    try:
        os.link(unfinished, path)  # of several processes that make one at once, the first wins
    except FileExistsError:
        pass
    finally:
        unfinished.unlink()


def trusted_keys(root: Path) -> dict[str, SSlibKey]:
    """The keys that a repository trusts, by their ids.

    Raises:
        ValueError: a file in `keys/` that is no public key in PEM.
    """
    found = {}
    for file in sorted((root / TRUSTED_FOLDER).glob("*.pub")):
        try:
            key = SSlibKey.from_crypto(load_pem_public_key(file.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{file}: expected a public key in PEM, got {error}") from error
        found[key.keyid] = key
    return found


def trust_own_key(root: Path) -> Path:
    """Writes the own public key into `keys/`, to be committed.

    Raises:
        ValueError: nothing is signed here.
    """
    signer = own_signer()
    if signer is None:
        raise ValueError(f"{SETTING}: expected a key, got {UNSIGNED!r}; unset it")
    file = root / TRUSTED_FOLDER / f"{signer.public_key.keyid[:SHORT]}.pub"
    file.parent.mkdir(exist_ok=True)
    public_key = load_pem_private_key(signer.private_bytes, password=None).public_key()
    file.write_bytes(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return file


def seal(statement: dict[str, Any], signer: CryptoSigner | None) -> str:
    """A statement in its DSSE envelope, as JSON; with no signature where there is no signer."""
    envelope = Envelope(json.dumps(statement, sort_keys=True).encode(), PAYLOAD_TYPE, {})
    if signer is not None:
        envelope.sign(signer)
    return json.dumps(envelope.to_dict(), indent=1) + "\n"


def unseal(text: str | bytes, trusted: dict[str, SSlibKey], own: SSlibKey | None = None) -> Opened:
    """Opens an envelope and judges its signature.

    Raises:
        ValueError: no DSSE envelope around a JSON object.
    """
    try:
        envelope = Envelope.from_dict(json.loads(text))
        statement = json.loads(envelope.payload)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"expected a DSSE envelope around JSON, got {type(error).__name__}: {error}") from error
    if envelope.payload_type != PAYLOAD_TYPE or not isinstance(statement, dict):
        raise ValueError(f"expected a payload of type {PAYLOAD_TYPE}, got {envelope.payload_type!r}")
    ids = list(envelope.signatures)
    if not ids:
        return Opened(statement, "unsigned", "")
    known: dict[str, tuple[Standing, SSlibKey]] = {keyid: ("trusted", key) for keyid, key in trusted.items()}
    if own is not None:
        known.setdefault(own.keyid, ("own", own))
    for keyid in ids:
        if keyid in known:
            standing, key = known[keyid]
            return Opened(statement, standing if _signed_by(envelope, [key]) else "altered", keyid[:SHORT])
    return Opened(statement, "untrusted", ids[0][:SHORT])


def _signed_by(envelope: Envelope, keys: Sequence[SSlibKey]) -> bool:
    try:
        return bool(envelope.verify(list(keys), 1))
    except (VerificationError, UnverifiedSignatureError):
        return False
