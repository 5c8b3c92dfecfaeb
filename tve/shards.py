"""Shards: pictures in WebDataset tars, with an index of every tar's SHA-256, size and number of samples.

A folder holds `<split>-000000.tar` ..., `names.csv` (key, split, name in the source) and `index.json`. The
members of a sample are `KEY.jpg` (or another picture extension: the source's own bytes), `KEY.labels.json`
{task: class index} where the dataset has tasks, and `KEY.masks.png` (bit i = object i) where it has masks.
The same input gives the same bytes.

WebDataset passes over a cut or damaged tar without an error: `Shards.open` checks all bytes, reading counts.
"""

import csv
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tve.digests import file_sha256
from tve.samples import Sample, decode_image, require_fitting

FORMAT = 1
INDEX_FILE = "index.json"
NAMES_FILE = "names.csv"
LABELS_MEMBER = "labels.json"
MASKS_MEMBER = "masks.png"
NUM_CHECKING_THREADS = 2


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One tar as the index lists it."""

    file: str
    sha256: str
    bytes: int
    num_samples: int


class Shards:
    """A dataset in a folder that `write_shards` wrote; `Shards.open(folder)` verifies it."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder = folder
        self.dataset = str(index["dataset"])
        self.tasks = {str(task): tuple(map(str, classes)) for task, classes in index["tasks"].items()}
        self.mask_objects = tuple(map(str, index["mask_objects"]))
        self.source: dict[str, Any] = dict(index["source"])
        self.files = {
            str(split): tuple(ShardFile(**entry) for entry in entries) for split, entries in index["splits"].items()
        }
        self.names_sha256 = str(index["names_sha256"])

    @classmethod
    def open(cls, folder: Path) -> "Shards":
        """The shards of a folder, after every tar's size and digest and the number of names were compared.

        Raises:
            ValueError: no index, one of another format, or a file that is not as the index says.
        """
        index_file = folder / INDEX_FILE
        if not index_file.is_file():
            raise ValueError(f"expected {index_file}, which does not exist; make it with the shards stage")
        try:
            index = json.loads(index_file.read_text())
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}")
            shards = cls(folder, index)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{index_file}: expected a shard index of format {FORMAT}, "
                f"got {type(error).__name__} {error}; make the shards again"
            ) from error
        shards._verify()
        return shards

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def num_samples(self, split: str) -> int:
        return sum(entry.num_samples for entry in self._files(split))

    def samples(self, split: str) -> Iterator[Sample]:
        """Every sample of a split, in the order in which it was written.

        Raises:
            ValueError: unknown split; while iterating, a tar that holds other samples than the index says.
        """
        return self._read(split, self._files(split))

    def shuffled(self, split: str, seed: int, epoch: int, start: int = 0, buffer: int = 1000) -> Iterator[Sample]:
        """Every sample of a split once, in an order given by (seed, epoch, buffer), from number `start` on.

        Tars come in random order, and samples pass through a buffer of `buffer` of them. What comes before
        `start` is read and not decoded.

        Raises:
            ValueError: unknown split, or a start beyond its end.
        """
        files = list(self._files(split))
        num_samples = self.num_samples(split)
        if not 0 <= start <= num_samples:
            raise ValueError(f"start: expected 0 to the {num_samples} samples of {split!r}, got {start}")
        rng = random.Random(f"{seed} {epoch}")
        rng.shuffle(files)
        # A full buffer before the first sample: otherwise the first ones come from the head of one tar.
        shuffle = _webdataset().shuffle(buffer, initial=buffer, rng=rng)
        return itertools.islice(shuffle(self._read(split, files)), start, None)

    @cached_property
    def _names(self) -> dict[str, dict[str, str]]:
        """Split -> key -> the picture's name in its source."""
        names: dict[str, dict[str, str]] = {split: {} for split in self.files}
        with (self.folder / NAMES_FILE).open(newline="", encoding="utf-8") as file:
            for key, split, name in itertools.islice(csv.reader(file), 1, None):
                names.setdefault(split, {})[key] = name
        return names

    def _files(self, split: str) -> tuple[ShardFile, ...]:
        if split not in self.files:
            raise ValueError(f"split of {self.dataset}: expected one of {sorted(self.files)}, got {split!r}")
        return self.files[split]

    def _verify(self) -> None:
        for entry in itertools.chain.from_iterable(self.files.values()):
            _require_unchanged(self.folder / entry.file, entry.sha256, entry.bytes)
        _require_unchanged(self.folder / NAMES_FILE, self.names_sha256)
        for split in self.files:
            if (named := len(self._names[split])) != self.num_samples(split):
                raise ValueError(
                    f"{self.folder / INDEX_FILE}: expected the {named} samples of {split!r} in {NAMES_FILE}, "
                    f"got {self.num_samples(split)}; make the shards again"
                )

    def _read(self, split: str, files: Iterable[ShardFile]) -> Iterator[Sample]:
        names = self._names[split]
        for entry in files:
            path = self.folder / entry.file
            num_read = 0
            for members in _tar_samples(path):
                yield self._sample(members, path, names)
                num_read += 1
            if num_read != entry.num_samples:
                raise ValueError(f"{path}: expected {entry.num_samples} samples, got {num_read}; make the shards again")

    def _sample(self, members: Mapping[str, Any], path: Path, names: Mapping[str, str]) -> Sample:
        key = str(members["__key__"])
        fields = {name: value for name, value in members.items() if not name.startswith("__")}
        labels = fields.pop(LABELS_MEMBER, None)
        masks = fields.pop(MASKS_MEMBER, None)
        labelled, masked = labels is not None, masks is not None
        if (labelled, masked, len(fields)) != (
            bool(self.tasks),
            bool(self.mask_objects),
            1,
        ) or key not in names:
            got = sorted(name for name in members if not name.startswith("__"))
            raise ValueError(f"{path}: sample {key}: got members {got}, which do not fit {INDEX_FILE}")
        ((extension, image),) = fields.items()
        labels = None if labels is None else json.loads(labels)
        return Sample(key, image, extension, labels, masks, names[key])


def write_shards(
    folder: Path,
    dataset: str,
    splits: Iterable[tuple[str, Iterable[Sample]]],
    tasks: Mapping[str, Sequence[str]],
    mask_objects: Sequence[str],
    shard_size: int,
    source: Mapping[str, Any],
) -> None:
    """Writes a dataset's tars, names and, last, index to `folder`; without the index it cannot be opened.

    Args:
        folder: where `Shards.open` will find them.
        dataset: the dataset's name.
        splits: names of splits with their samples, which are read once.
        tasks: class names of each task; empty for a label-free dataset.
        mask_objects: what the bits of the samples' masks mean; empty where there are none.
        shard_size: samples in a tar.
        source: where the pictures came from; free form, JSON.

    Raises:
        ValueError: a picture that cannot be decoded, an empty split, labels or masks that do not fit the
            dataset, a folder that holds something already.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: expected at least 1, got {shard_size}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected a new or empty folder for {dataset}, got one with files")
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[ShardFile]] = {}
    with (folder / NAMES_FILE).open("w", newline="", encoding="utf-8") as file:
        names = csv.writer(file, lineterminator="\n")
        names.writerow(("key", "split", "name"))
        for split, samples in splits:
            files[split] = []
            for path, shard in _shards(folder, split, samples, tasks, mask_objects, shard_size):
                files[split].append(_write_tar(path, shard))
                names.writerows((sample.key, split, sample.name) for sample in shard)
    index = {
        "dataset": dataset,
        "format": FORMAT,
        "tasks": {task: list(classes) for task, classes in tasks.items()},
        "mask_objects": list(mask_objects),
        "splits": {split: [asdict(entry) for entry in entries] for split, entries in files.items()},
        "names_sha256": file_sha256(folder / NAMES_FILE),
        "source": dict(source),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _shards(
    folder: Path,
    split: str,
    samples: Iterable[Sample],
    tasks: Mapping[str, Sequence[str]],
    mask_objects: Sequence[str],
    shard_size: int,
) -> Iterator[tuple[Path, list[Sample]]]:
    """Where each tar of a split goes, and its samples, which were found to be in order."""
    if not re.fullmatch(r"\w+", split, re.ASCII):
        raise ValueError(f"split: expected letters, digits and '_', got {split!r}")
    keys: set[str] = set()
    remaining = iter(samples)

    def check(sample: Sample) -> None:
        require_fitting(sample, tasks, mask_objects)
        decode_image(sample.image, sample.name)

    with ThreadPoolExecutor(NUM_CHECKING_THREADS, thread_name_prefix="check") as pool:
        for number in itertools.count():
            shard = list(itertools.islice(remaining, shard_size))
            if not shard:
                break
            list(pool.map(check, shard))
            for sample in shard:
                if sample.key in keys:
                    raise ValueError(f"key of {sample.name}: expected a new one, got {sample.key!r} again")
                keys.add(sample.key)
            yield folder / f"{split}-{number:06d}.tar", shard
    if not keys:
        raise ValueError(f"split {split!r}: expected at least one picture, got none")


def _write_tar(path: Path, samples: Sequence[Sample]) -> ShardFile:
    # mtime=0: otherwise no two runs would write the same bytes.
    with path.open("wb") as file, _webdataset().TarWriter(file, mtime=0, encoder=False) as tar:
        for sample in samples:
            members: dict[str, Any] = {"__key__": sample.key, sample.extension: sample.image}
            if sample.labels is not None:
                members[LABELS_MEMBER] = json.dumps(sample.labels, sort_keys=True).encode()
            if sample.masks is not None:
                members[MASKS_MEMBER] = sample.masks
            tar.write(members)
    read_back = [str(members["__key__"]) for members in _tar_samples(path)]
    assert read_back == [sample.key for sample in samples], path
    return ShardFile(path.name, file_sha256(path), path.stat().st_size, len(samples))


def _tar_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Members of each sample of a tar, by extension, with "__key__"; bytes, nothing decoded."""
    tars = _webdataset().tariterators
    # An open file, not an address: WebDataset executes some addresses.
    with path.open("rb") as file:
        yield from tars.group_by_keys(tars.tar_file_expander([{"url": str(path), "stream": file}]))


def _require_unchanged(path: Path, sha256: str, num_bytes: int | None = None) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got none; make the shards again")
    if num_bytes is not None and (size := path.stat().st_size) != num_bytes:
        raise ValueError(f"{path}: expected {num_bytes} bytes, got {size}; make the shards again")
    if (actual := file_sha256(path)) != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {actual}; make the shards again")


def _webdataset() -> Any:
    """WebDataset with its own safety switch on, which it reads when it is imported."""
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    return webdataset
