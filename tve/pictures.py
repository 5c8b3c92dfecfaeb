"""Batches of preprocessed pictures from shards, in an order that depends on (seed, step) alone, so that runs resume."""

import itertools
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tve.backbones import Backbone
from tve.samples import Sample, decode_image
from tve.shards import Shards

NUM_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """Normalised pictures and where they came from."""

    images_B3SS: Tensor
    keys: list[str]


def training_batches(
    shards: Shards,
    split: str,
    backbone: Backbone,
    *,
    batch_size: int,
    seed: int,
    augment: bool = False,
    start_step: int = 0,
    num_threads: int | None = None,
) -> Iterator[PictureBatch]:
    """Endless shuffled batches; step s is the same batch whether or not the run was cut short before it.

    Augmentation is a random square crop and a mirror image, drawn from (seed, epoch, key). Targets are computed on the
    augmented picture itself, so no label could be spoiled. `num_threads` threads decode, by default one
    for each core that the process may use, 16 at most.

    Raises:
        ValueError: a split with fewer pictures than a batch.
    """
    num_samples = shards.num_samples(split)
    steps_per_epoch = num_samples // batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"batch_size: expected at most the {num_samples} pictures of {split!r}, got {batch_size}")

    def load(sample: Sample, epoch: int) -> Tensor:
        image = decode_image(sample.image)
        return backbone.preprocess(_augmented(image, seed, epoch, sample.key) if augment else image)

    def steps() -> Iterator[tuple[int, list[Sample]]]:
        epoch, skipped = divmod(start_step, steps_per_epoch)
        while True:
            samples = shards.shuffled(split, seed, epoch, start=skipped * batch_size)
            for _ in range(skipped, steps_per_epoch):
                yield epoch, list(itertools.islice(samples, batch_size))
            epoch, skipped = epoch + 1, 0

    num_threads = num_threads or min(16, _usable_cores())
    pending: deque[tuple[list[str], list[Future[Tensor]]]] = deque()
    # set_num_threads is of the calling thread: without it each decoder starts a team of threads of its own.
    with ThreadPoolExecutor(num_threads, "decode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for epoch, samples in steps():
            pending.append(([s.key for s in samples], [pool.submit(load, s, epoch) for s in samples]))
            if len(pending) > NUM_BATCHES_AHEAD:
                keys, images = pending.popleft()
                yield PictureBatch(torch.stack([image.result() for image in images]), keys)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_batches(
    shards: Shards, split: str, backbone: Backbone, *, batch_size: int, limit: int | None = None
) -> Iterator[tuple[list[Sample], Tensor]]:
    """Each picture of a split once, in the order of the shards: (samples, images [B, 3, S, S])."""
    samples = itertools.islice(shards.samples(split), limit)
    while batch := list(itertools.islice(samples, batch_size)):
        yield batch, torch.stack([backbone.preprocess(decode_image(sample.image)) for sample in batch])


def _augmented(image: Image.Image, seed: int, epoch: int, key: str) -> Image.Image:
    rng = np.random.default_rng([seed, epoch, zlib.crc32(key.encode())])
    side = int(min(image.size) * rng.uniform(0.6, 1.0))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
    cropped = image.crop((left, top, left + side, top + side))
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cropped
