"""Stage `shards`: the pictures of one dataset become WebDataset tars with an index.

python -m tve_pipeline.shards DATASET
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tve.digests import file_sha256
from tve.samples import Sample, encode_masks
from tve.shards import write_shards
from tve.sources import (
    Picture,
    Source,
    class_names,
    held_out_splits,
    list_pictures,
    named_splits,
    open_source,
)
from tve_pipeline.entry import run_stage
from tve_pipeline.outputs import whole_folder
from tve_pipeline.params import PicturesDataset, ScenesDataset, active_profile, existing_path, load_dataset
from tve_pipeline.scenes import SPLIT_IDS, TASKS, scene

MASK_OBJECTS = ("digit", "shape", "distractor")
NUM_PROCESSES = min(2, os.cpu_count() or 1)


def main(argv: list[str]) -> None:
    (name,) = argv
    dataset = load_dataset(name)
    with whole_folder(Path("data", active_profile(), "shards", name)) as folder:
        if isinstance(dataset, ScenesDataset):
            write_scenes(folder, name, dataset)
        else:
            write_pictures(folder, name, dataset)


def write_scenes(folder: Path, name: str, dataset: ScenesDataset) -> None:
    """Shards of generated pictures; those of a dataset that is not labelled hold neither labels nor masks.

    Raises:
        ValueError: a split that scenes do not have.
    """
    if unknown := sorted(dataset.splits.keys() - SPLIT_IDS.keys()):
        raise ValueError(f"datasets.{name}.splits: expected splits among {sorted(SPLIT_IDS)}, got {unknown}")
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        write_shards(
            folder,
            name,
            ((split, _scene_samples(pool, dataset, split, count)) for split, count in dataset.splits.items()),
            tasks=TASKS if dataset.labelled else {},
            mask_objects=MASK_OBJECTS if dataset.labelled else (),
            shard_size=dataset.shard_size,
            source={"kind": "scenes", "seed": dataset.seed, "num_pictures": dict(dataset.splits)},
        )


def write_pictures(folder: Path, name: str, dataset: PicturesDataset) -> None:
    """Shards of the pictures of a folder, a zip or a tar, as the bytes that they are there.

    Raises:
        ValueError: a source, a table or a picture that cannot be read, or a split without pictures.
        FileNotFoundError: no such source.
    """
    path = existing_path(dataset.source, f"datasets.{name}.source")
    with open_source(path, dataset.sha256) as source:
        splits, tasks = plan_pictures(source, dataset)
        counts = {split: len(pictures) for split, pictures in splits.items()}
        sha256 = dataset.sha256 or (file_sha256(path) if path.is_file() else None)
        write_shards(
            folder,
            name,
            ((split, _picture_samples(source, split, splits[split], tasks)) for split in splits),
            tasks=tasks,
            mask_objects=(),
            shard_size=dataset.shard_size,
            source={"kind": "pictures", "name": dataset.source, "sha256": sha256, "num_pictures": counts},
        )


def plan_pictures(source: Source, dataset: PicturesDataset) -> tuple[dict[str, list[Picture]], dict[str, list[str]]]:
    """Which pictures go into each split, and the class names of each task; no picture is read.

    A task's classes are those of all pictures that splits choose from: a `limit` changes no class index.

    Raises:
        ValueError: no pictures, a table that does not fit, a split without pictures, a task with one class.
    """
    columns = dataset.tasks or {}
    pictures = list_pictures(source, dataset.folder, dataset.table, columns, dataset.split_column)
    if dataset.splits is not None:
        wanted = {split: (params.value, params.limit) for split, params in dataset.splits.items()}
        splits = named_splits(pictures, wanted)
        groups = {group for group, _ in wanted.values()}
        pictures = [picture for picture in pictures if picture.group in groups]
    else:
        assert dataset.hold_out is not None
        assert dataset.rest is not None
        splits = held_out_splits(pictures, dataset.hold_out.split, dataset.hold_out.count, dataset.rest)
    tasks = {task: class_names(pictures, task) for task in columns}
    for task, classes in tasks.items():
        if len(classes) < 2:
            raise ValueError(f"{source.path}: task {task!r}: expected two classes or more, got {classes}")
    return splits, tasks


def _scene_samples(pool: ProcessPoolExecutor, dataset: ScenesDataset, split: str, count: int) -> Iterator[Sample]:
    make = partial(_scene_sample, dataset.seed, split, dataset.labelled)
    with tqdm(total=count, desc=split, unit="picture", disable=None) as progress:
        # By the shard: a pool's `map` makes everything it is given at once.
        for start in range(0, count, dataset.shard_size):
            for sample in pool.map(make, range(start, min(start + dataset.shard_size, count)), chunksize=50):
                yield sample
                progress.update()


def _scene_sample(seed: int, split: str, labelled: bool, index: int) -> Sample:
    made = scene(seed, split, index)
    file = io.BytesIO()
    Image.fromarray(made.pixels).save(file, "PNG")
    labels = made.labels if labelled else None
    masks = encode_masks([made.masks[name] for name in MASK_OBJECTS]) if labelled else None
    return Sample(f"{index:09d}", file.getvalue(), "png", labels, masks, name=f"scene {seed} {split} {index}")


def _picture_samples(
    source: Source, split: str, pictures: list[Picture], tasks: dict[str, list[str]]
) -> Iterator[Sample]:
    indices = {task: {name: index for index, name in enumerate(names)} for task, names in tasks.items()}
    progress = tqdm(pictures, desc=split, unit="picture", disable=None)
    for number, picture in enumerate(progress):
        labels = {task: indices[task][name] for task, name in picture.labels.items()} if tasks else None
        yield Sample(f"{number:09d}", source.read(picture.file), picture.extension, labels, None, picture.name)


if __name__ == "__main__":
    run_stage("shards", main, "DATASET")
