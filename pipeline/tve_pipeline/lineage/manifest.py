"""A folder's own proof: a signed list of its files inside it, which goes where the folder goes.

An in-toto statement whose subjects are the files, in a DSSE envelope. The same files and key give the same bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]

from tve_pipeline.lineage.files import listed, records
from tve_pipeline.lineage.keys import STATEMENT_TYPE, Opened, seal, unseal

FILE = "manifest.json"
PREDICATE_TYPE = "urn:tve:folder:1"


@dataclass(frozen=True, slots=True)
class Verified:
    """What is wrong with a folder, a line each, and what its manifest's signature is worth."""

    problems: list[str]
    opened: Opened
    num_files: int


def sign_folder(folder: Path, about: Mapping[str, Any], signer: CryptoSigner | None) -> None:
    """Writes the manifest of what is in the folder now.

    Args:
        folder: with no links in it.
        about: what the manifest says of the folder besides, JSON.
        signer: None leaves the manifest unsigned.
    """
    files = [file for file in listed(folder) if file != folder / FILE]
    subjects = [
        {"name": Path(path).relative_to(folder).as_posix(), "digest": {"sha256": each.sha256}}
        for path, each in records(files, md5=False).items()
    ]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": dict(about),
    }
    (folder / FILE).write_text(seal(statement, signer))


def verify_folder(folder: Path, trusted: dict[str, SSlibKey], own: SSlibKey | None = None) -> Verified:
    """Holds a folder against its manifest: every file, none too many, no links.

    Raises:
        ValueError: no manifest, or none that can be read.
    """
    path = folder / FILE
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{folder}: expected a folder with a {FILE}, got none; exports have one")
    opened = unseal(path.read_bytes(), trusted, own)
    try:
        if (kind := opened.statement["predicateType"]) != PREDICATE_TYPE:
            raise ValueError(f"{path}: expected {PREDICATE_TYPE}, got {kind!r}")
        known = {each["name"]: each["digest"]["sha256"] for each in opened.statement["subject"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a list of files, got a statement without {error}") from error
    present = {file.relative_to(folder).as_posix(): file for file in listed(folder) if file != path}
    problems = [f"{name} is a link" for name, file in present.items() if file.is_symlink()]
    problems += [f"{name} is not in the manifest" for name in sorted(set(present) - set(known))]
    problems += [f"{name} is gone" for name in sorted(set(known) - set(present))]
    plain = [file for name, file in present.items() if name in known and not file.is_symlink()]
    for file, each in records(plain, md5=False).items():
        name = Path(file).relative_to(folder).as_posix()
        if each.sha256 != known[name]:
            problems.append(f"{name} was altered")
    if opened.standing == "altered":
        problems.append(f"key {opened.key} did not sign this manifest: it was altered")
    return Verified(problems, opened, len(known))
