"""One picture with what is known of it, as the shards hold it: its bytes, labels by task, masks of its objects."""

import io
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with what is known of it."""

    key: str  # unique in its split; letters, digits, "_" and "-"
    image: bytes  # the picture's file, as it was in the source
    extension: str  # of IMAGE_EXTENSIONS
    labels: dict[str, int] | None  # task -> class index; None where the dataset has no tasks
    masks: bytes | None  # from `encode_masks`; None where the dataset has no masks
    name: str  # the picture's name in its source


def require_fitting(sample: Sample, tasks: Mapping[str, Sequence[str]], mask_objects: Sequence[str]) -> None:
    if not re.fullmatch(r"[\w-]+", sample.key, re.ASCII):
        # WebDataset reads everything after the first dot as the member's extension.
        raise ValueError(f"key of {sample.name}: expected letters, digits, '_' and '-', got {sample.key!r}")
    if sample.extension not in IMAGE_EXTENSIONS:
        raise ValueError(f"{sample.name}: expected one of {IMAGE_EXTENSIONS}, got {sample.extension!r}")
    if (sample.labels or {}).keys() != tasks.keys() or (sample.labels is None) == bool(tasks):
        raise ValueError(f"labels of {sample.name}: expected the tasks {sorted(tasks)}, got {sample.labels}")
    for task, label in (sample.labels or {}).items():
        if not 0 <= label < (num_classes := len(tasks[task])):
            raise ValueError(f"labels of {sample.name}: expected {task} below {num_classes}, got {label}")
    if (sample.masks is None) == bool(mask_objects):
        got = "none" if sample.masks is None else "masks"
        raise ValueError(f"masks of {sample.name}: expected masks of {list(mask_objects)}, got {got}")


def decode_image(data: bytes, name: str = "picture") -> Image.Image:
    """The picture of a file's bytes, RGB.

    Raises:
        ValueError: not a complete JPEG, PNG, WebP or BMP of at most 64 million pixels.
    """
    expected = f"{name}: expected a complete picture ({', '.join(IMAGE_FORMATS)})"
    broken = (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    )
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS} pixels: {image.width} x {image.height}")
            return image.convert("RGB")
    except broken as error:
        raise ValueError(f"{expected}, got {len(data)} bytes: {error}; replace or remove it") from error


def encode_masks(masks: Sequence[NDArray[np.bool_]]) -> bytes:
    """A PNG whose bit i is object i, from up to eight masks, each bool [height, width]."""
    if not 1 <= len(masks) <= 8:
        raise ValueError(f"masks: expected 1 to 8 objects, got {len(masks)}")
    bits = np.zeros(masks[0].shape, dtype=np.uint8)
    for bit, mask in enumerate(masks):
        bits |= mask.astype(np.uint8) << bit
    file = io.BytesIO()
    Image.fromarray(bits).save(file, "PNG")
    return file.getvalue()


def decode_masks(data: bytes, num_objects: int) -> NDArray[np.bool_]:
    """Bool [num_objects, height, width], True on the object, from `encode_masks`' bytes."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        bits = np.asarray(image, dtype=np.uint8)
    return (bits[None] >> np.arange(num_objects, dtype=np.uint8)[:, None, None] & 1).astype(np.bool_)
