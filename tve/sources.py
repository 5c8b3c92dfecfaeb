"""Sources: pictures in a folder, a zip or a tar, labelled by a table, by class folders, or not at all.

Pictures come in the order of the SHA-256 of their names: a fixed shuffle, so that the first n of them are a
fair sample, and a picture's place does not depend on how the source was packed.
"""

import csv
import hashlib
import io
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tve.digests import file_sha256
from tve.samples import IMAGE_EXTENSIONS

FILE_COLUMN = "file"
FOLDER_COLUMN = "folder"


@dataclass(frozen=True, slots=True)
class Source:
    """An open folder, zip or tar: the names of its files, and what reads one of them."""

    path: Path
    names: frozenset[str]  # relative, "/" between parts
    read: Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a source, not yet read."""

    file: str  # in the source
    name: str  # the same below the pictures' folder
    labels: dict[str, str]  # task -> class name
    group: str | None  # what a named split is made of: the split column, or the first folder of the name

    @property
    def extension(self) -> str:
        return self.file.rsplit(".", 1)[-1].lower()


@contextmanager
def open_source(path: Path, sha256: str | None = None) -> Iterator[Source]:
    """The source at `path`, open while the context lasts.

    Args:
        path: a folder, a zip, or a tar that is not compressed.
        sha256: expected digest of a zip or tar; None where it is not pinned.

    Raises:
        ValueError: no such file, another digest, or a file that is damaged or of another kind.
    """
    if path.is_dir():
        if sha256 is not None:
            raise ValueError(f"{path}: expected a zip or tar, which sha256 pins, got a folder; set sha256 to null")
        files = dict(_walk(path))
        yield Source(path, frozenset(files), lambda name: files[name].read_bytes())
        return
    if not path.is_file():
        raise ValueError(f"source: expected a folder, a zip or a tar, got {path}, which does not exist")
    if sha256 is not None and (actual := file_sha256(path)) != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {actual}; the file is not the one that was pinned")
    if zipfile.is_zipfile(path):
        with _open_zip(path) as archive:
            yield _zip_source(path, archive)
    else:
        with _open_tar(path) as tar:
            yield _tar_source(path, tar)


def list_pictures(
    source: Source, folder: str | None, table: str | None, tasks: Mapping[str, str], split_column: str | None
) -> list[Picture]:
    """The pictures of a source, in the fixed order of the module's first lines; none is read.

    Args:
        source: from `open_source`.
        folder: where in the source the pictures lie; None for its root.
        table: a CSV in the source whose column `file` is a path below `folder`; only what it lists is used.
            None: every picture file is used.
        tasks: task -> the table's column with the class names; without a table "folder", the folder that the
            picture lies in.
        split_column: the table's column by which splits are chosen; None: the first folder of the path.

    Raises:
        ValueError: no pictures, a table that does not fit, or a picture without a label.
    """
    prefix = posixpath.join(posixpath.normpath(folder or "."), "").removeprefix("./")
    files = {name.removeprefix(prefix): name for name in source.names if _is_picture(name) and name.startswith(prefix)}
    if not files:
        where = f"{source.path}, below {prefix!r}" if prefix else str(source.path)
        raise ValueError(f"{where}: expected pictures ({', '.join(IMAGE_EXTENSIONS)}), got none")
    if table is None:
        pictures = [_from_folders(source, file, name, tasks) for name, file in files.items()]
    else:
        rows = _rows(source, table, {FILE_COLUMN, *tasks.values()} | ({split_column} if split_column else set()))
        pictures = [_from_row(source, table, row, files, tasks, split_column) for row in rows]
        if len({picture.name for picture in pictures}) != len(pictures):
            names = [picture.name for picture in pictures]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{source.path}, {table}: expected each picture once, got {twice} more than once")
    return sorted(pictures, key=lambda picture: hashlib.sha256(picture.name.encode()).digest())


def named_splits(pictures: Sequence[Picture], wanted: Mapping[str, tuple[str, int | None]]) -> dict[str, list[Picture]]:
    """The pictures of each split: those whose group is the first value, at most as many as the second.

    Raises:
        ValueError: a group without pictures.
    """
    splits = {}
    for split, (group, limit) in wanted.items():
        members = [picture for picture in pictures if picture.group == group]
        if not members:
            known = sorted({str(picture.group) for picture in pictures})
            raise ValueError(f"split {split!r}: expected one of the values {known[:20]}, got {group!r}")
        splits[split] = members[:limit]
    return splits


def held_out_splits(pictures: Sequence[Picture], held_out: str, count: int, rest: str) -> dict[str, list[Picture]]:
    """Two splits: the `count` pictures whose names' hashes are smallest, and the rest.

    Raises:
        ValueError: no picture would remain.
    """
    if not 0 < count < len(pictures):
        raise ValueError(f"{held_out}: expected 1 to {len(pictures) - 1} of {len(pictures)} pictures, got {count}")
    return {rest: list(pictures[count:]), held_out: list(pictures[:count])}


def class_names(pictures: Sequence[Picture], task: str) -> list[str]:
    """The classes of a task in the order of their indices: by name, or by number if all are numbers."""
    names = sorted({picture.labels[task] for picture in pictures})
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder, by its relative name; linked folders are entered, once each."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for file in files:
            path = Path(parent, file)
            yield path.relative_to(root).as_posix(), path


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: expected a complete zip; the file is cut short or damaged: {error}") from error


def _zip_source(path: Path, archive: zipfile.ZipFile) -> Source:
    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
            raise ValueError(f"{path}, {name}: expected a readable file, got {error}; the zip is damaged") from error

    return Source(path, frozenset(info.filename for info in archive.infolist() if not info.is_dir()), read)


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: expected a folder, a zip, or a tar that is not compressed (pictures are), got {error}"
        ) from error


def _tar_source(path: Path, archive: tarfile.TarFile) -> Source:
    damaged = f"{path}: expected a complete tar; the file is cut short or damaged"
    try:
        members = archive.getmembers()
    except tarfile.TarError as error:
        raise ValueError(f"{damaged}: {error}") from error
    # At a damaged header tarfile stops as if it were at the end; the true end is a block of zeros.
    with path.open("rb") as file:
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(damaged)
    files = {posixpath.normpath(member.name): member for member in members if member.isreg()}

    def read(name: str) -> bytes:
        file = archive.extractfile(files[name])
        assert file is not None
        try:
            return file.read()
        except tarfile.TarError as error:
            raise ValueError(f"{damaged}: {name}: {error}") from error

    return Source(path, frozenset(files), read)


def _is_picture(name: str) -> bool:
    # Some archivers leave hidden files beside the pictures, with a picture's extension.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and posixpath.splitext(name)[1].lower().removeprefix(".") in IMAGE_EXTENSIONS


def _from_folders(source: Source, file: str, name: str, tasks: Mapping[str, str]) -> Picture:
    *folders, _ = name.split("/")
    for task, column in tasks.items():
        if column != FOLDER_COLUMN:
            raise ValueError(f"task {task!r}: expected 'folder' where there is no table, got {column!r}")
        if not folders:
            raise ValueError(f"{source.path}: expected each picture in the folder of its class, got {name}")
    top, parent = (folders[0], folders[-1]) if folders else (None, "")
    return Picture(file, name, dict.fromkeys(tasks, parent), top)


def _rows(source: Source, table: str, columns: set[str]) -> list[dict[str, str]]:
    if table not in source.names:
        raise ValueError(f"{source.path}: expected the table {table}, got none of that name; set table to null if so")
    try:
        text = source.read(table).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.path}, {table}: expected UTF-8: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{source.path}, {table}: expected a CSV: {error}") from error
    if unknown := columns - set(reader.fieldnames or ()):
        known = ", ".join(reader.fieldnames or ())
        raise ValueError(f"{source.path}, {table}: no column {sorted(unknown)}; known columns: {known}")
    return rows


def _from_row(
    source: Source,
    table: str,
    row: Mapping[str, str],
    files: Mapping[str, str],
    tasks: Mapping[str, str],
    split_column: str | None,
) -> Picture:
    name = row[FILE_COLUMN]
    if name not in files:
        raise ValueError(f"{source.path}, {table}: expected a picture in the source, got {name!r}, which is not there")
    labels = {task: row[column] for task, column in tasks.items()}
    if missing := sorted(task for task, label in labels.items() if not label):
        raise ValueError(f"{source.path}, {table}: expected a class of {missing} for {name}, got an empty cell")
    group = row[split_column] if split_column else name.split("/")[0] if "/" in name else None
    return Picture(files[name], name, labels, group)
