"""Files as evidence names them: path, size, sha256, and the md5 by which DVC knows them."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's content, and the state of its inode when it was read."""

    size: int
    sha256: str
    md5: str = ""
    state: tuple[int, int, int] = (0, 0, 0)


def listed(path: Path) -> list[Path]:
    """The files of a folder, whatever their names; a file is its own list; nothing where nothing is.

    Links to files are listed as they are; links to folders too, and not followed.
    """
    if path.is_symlink() or path.is_file():
        return [path]
    found = []
    for folder, folders, names in os.walk(path):
        linked = [name for name in folders if Path(folder, name).is_symlink()]
        found += [Path(folder, name) for name in (*names, *linked)]
    return sorted(found)


def records(paths: Iterable[Path], *, md5: bool) -> dict[str, FileRecord]:
    """Every file's record, by its path as given; each is read once, several at a time."""
    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "hash") as pool:
        found = pool.map(lambda path: record(path, md5=md5), paths)
        return {path.as_posix(): each for path, each in zip(paths, found, strict=True)}


def record(path: Path, *, md5: bool) -> FileRecord:
    """One file's record.

    Raises:
        OSError: it cannot be read.
    """
    sha256, other = hashlib.sha256(), hashlib.md5(usedforsecurity=False) if md5 else None
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        while count := file.readinto(buffer):
            sha256.update(buffer[:count])
            if other is not None:
                other.update(buffer[:count])
    return FileRecord(before.st_size, sha256.hexdigest(), other.hexdigest() if other else "", state_of(before))


def state_of(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def dvc_md5(path: str, md5_of: Mapping[str, str]) -> str | None:
    """What DVC calls the md5 of a path, from the md5 of files at or below it; None where there are none.

    A folder's is the md5 of its files' list (dvc-data, `Tree.as_bytes`), with ".dir" behind it.
    """
    if path in md5_of:
        return md5_of[path]
    prefix = path.rstrip("/") + "/"
    below = {name.removeprefix(prefix): md5 for name, md5 in md5_of.items() if name.startswith(prefix)}
    if not below:
        return None
    listing = json.dumps([{"md5": md5, "relpath": name} for name, md5 in sorted(below.items())], sort_keys=True)
    return hashlib.md5(listing.encode(), usedforsecurity=False).hexdigest() + ".dir"
