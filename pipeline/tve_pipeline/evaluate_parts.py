"""Batches of an evaluation as they are done: one file each, so that a run that was cut short goes on where it stopped.

A folder of parts belongs to one set of inputs, settings and code: parts of another are never gone on with.
"""

import hashlib
import importlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKAGES = ("tve", "tve_kernels", "tve_pipeline")


@dataclass(frozen=True, slots=True)
class Part:
    """What was found about the pictures of one batch."""

    rows: list[dict[str, Any]]  # of scores.csv: one a picture, task and map
    curves: dict[str, list[list[float]]]  # "removal/task/map" -> sums over the pictures, [2, F]: removed, kept
    seconds: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)  # what is the same for every batch
    shown: list[dict[str, Any]] = field(default_factory=list)  # pictures whose maps are shown: key, name, classes
    arrays: dict[str, NDArray[Any]] = field(
        default_factory=dict
    )  # "images", "task/map": those pictures' pixels and maps


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one evaluation."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, made_from: Mapping[str, Any]) -> "Parts":
        """The parts below `folder` that were made from just this; those of anything else are removed."""
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
        mine = folder / digest
        for other in folder.glob("*"):
            if other != mine:
                shutil.rmtree(other, ignore_errors=True)
        mine.mkdir(parents=True, exist_ok=True)
        return cls(mine)

    def has(self, number: int) -> bool:
        return self._path(number).is_file()

    def add(self, number: int, part: Part) -> None:
        """Writes a batch, whole or not at all."""
        document = {"rows": part.rows, "curves": part.curves, "seconds": part.seconds, "about": part.about}
        text = json.dumps(document | {"shown": part.shown})
        buffer = io.BytesIO()
        np.savez(buffer, document=np.frombuffer(text.encode(), dtype=np.uint8), **part.arrays)  # type: ignore[arg-type]
        partial = self._path(number).with_suffix(".partial")
        partial.write_bytes(buffer.getvalue())
        partial.rename(self._path(number))

    def __iter__(self) -> Iterator[Part]:
        """The batches in their order, one in memory at a time."""
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as arrays:
                document = json.loads(arrays["document"].tobytes())
                yield Part(**document, arrays={name: arrays[name] for name in arrays.files if name != "document"})

    def remove(self) -> None:
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"


def code_digest() -> str:
    """SHA-256 over the sources of this project's packages, in the order of their paths."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        root = Path(str(importlib.import_module(package).__file__)).parent
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()
