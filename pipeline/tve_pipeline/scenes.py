"""Scenes: small synthetic pictures whose every object, label and mask is known.

A scene is 64 x 64 pixels on an 8 x 8 grid of 8-pixel patches. It holds one handwritten digit (UCI digits, as
scikit-learn ships them), one coloured geometric shape, and one or two grey hatchings that belong to no task, all
16 pixels wide, aligned to the grid, on a textured background. Digit and shape are at least one patch apart.

Scene `index` of a split is a pure function of (seed, split, index): nothing depends on order or on the machine.
Test scenes draw their digits from handwriting that no training scene uses.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IMAGE_SIZE = 64
PATCH_SIZE = 8
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
OBJECT_SIZE = 2 * PATCH_SIZE

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "green": (45, 175, 60),
    "blue": (60, 90, 225),
    "yellow": (225, 200, 40),
    "magenta": (200, 60, 200),
    "cyan": (50, 190, 200),
}
TASKS: dict[str, tuple[str, ...]] = {
    "digit": tuple(str(digit) for digit in range(10)),
    "parity": ("even", "odd"),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "joint": tuple(f"{digit} {shape}" for digit in range(10) for shape in SHAPES),
}
OBJECT_OF_TASK = {"digit": "digit", "parity": "digit", "shape": "shape", "colour": "shape"}
SPLIT_IDS = {"pretrain": 0, "pretrain_val": 1, "train": 2, "test": 3}
NUM_TEST_HANDWRITINGS = 397


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture with everything that is known of it."""

    pixels: NDArray[np.uint8]  # [64, 64, 3], RGB
    labels: dict[str, int]  # task -> index into TASKS[task]
    masks: dict[str, NDArray[np.bool_]]  # "digit", "shape", "distractor" -> [64, 64], True on the object


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene with this index; the same bytes on every machine.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLIT_IDS:
        raise ValueError(f"scenes split: expected one of {sorted(SPLIT_IDS)}, got {split!r}")
    rng = np.random.default_rng([seed, SPLIT_IDS[split], index])
    handwriting, handwriting_digits = _handwriting()
    pool = np.arange(len(handwriting))
    pool = pool[-NUM_TEST_HANDWRITINGS:] if split == "test" else pool[:-NUM_TEST_HANDWRITINGS]

    written = int(rng.choice(pool))
    digit = int(handwriting_digits[written])
    shape = int(rng.integers(len(SHAPES)))
    colour = int(rng.integers(len(COLOURS)))
    corners = _place(rng, num_distractors=int(rng.integers(1, 3)))

    canvas = _texture(rng)
    masks = {name: np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.bool_) for name in ("digit", "shape", "distractor")}
    for corner in corners[2:]:
        grey = np.full(3, rng.uniform(150, 230), dtype=np.float32)
        _paint(canvas, masks["distractor"], corner, _hatching(rng), grey)
    ink = np.full(3, rng.uniform(215, 255), dtype=np.float32)
    _paint(canvas, masks["digit"], corners[0], _jittered(rng, handwriting[written]), ink)
    paint = np.array(tuple(COLOURS.values())[colour], dtype=np.float32) + rng.uniform(-20, 20, 3).astype(np.float32)
    _paint(canvas, masks["shape"], corners[1], _shape_alpha(SHAPES[shape], int(rng.integers(13, 17))), paint)

    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    joint = digit * len(SHAPES) + shape
    labels = {"digit": digit, "parity": digit % 2, "shape": shape, "colour": colour, "joint": joint}
    return Scene(pixels, labels, masks)


def _place(rng: np.random.Generator, num_distractors: int) -> list[tuple[int, int]]:
    """Patch corners of digit, shape and distractors: none overlap, digit and shape have a patch between them."""
    last = PATCHES_PER_SIDE - 2
    corners: list[tuple[int, int]] = []
    while len(corners) < 2 + num_distractors:
        row, col = (int(value) for value in rng.integers(0, last + 1, 2))
        gaps = [max(abs(row - other_row), abs(col - other_col)) for other_row, other_col in corners]
        required = 3 if len(corners) == 1 else 2
        if all(gap >= required for gap in gaps):
            corners.append((row, col))
    return corners


def _paint(
    canvas: NDArray[np.float32],
    mask: NDArray[np.bool_],
    corner: tuple[int, int],
    alpha: NDArray[np.float32],
    colour: NDArray[np.float32],
) -> None:
    rows = slice(corner[0] * PATCH_SIZE, corner[0] * PATCH_SIZE + OBJECT_SIZE)
    cols = slice(corner[1] * PATCH_SIZE, corner[1] * PATCH_SIZE + OBJECT_SIZE)
    canvas[rows, cols] += alpha[..., None] * (colour - canvas[rows, cols])
    mask[rows, cols] |= alpha > 0.25


def _texture(rng: np.random.Generator) -> NDArray[np.float32]:
    """A muted background [64, 64, 3] with structure at two scales."""
    base = rng.uniform(40, 110) + rng.uniform(-12, 12, 3)
    canvas = np.tile(base.astype(np.float32), (IMAGE_SIZE, IMAGE_SIZE, 1))
    for cells, strength in ((4, 18.0), (16, 12.0)):
        noise = rng.normal(0.0, strength, (cells, cells)).astype(np.float32)
        canvas += _resized(noise, IMAGE_SIZE)[..., None]
    return canvas + rng.normal(0.0, 5.0, canvas.shape).astype(np.float32)


def _jittered(rng: np.random.Generator, alpha: NDArray[np.float32]) -> NDArray[np.float32]:
    """An opacity map, slightly turned and scaled about its centre."""
    angle, scale = rng.uniform(-0.17, 0.17), rng.uniform(0.95, 1.12)
    cos, sin, middle = np.cos(angle) * scale, np.sin(angle) * scale, OBJECT_SIZE / 2
    affine = (cos, -sin, middle * (1 - cos + sin), sin, cos, middle * (1 - sin - cos))
    turned = Image.fromarray(alpha).transform(
        (OBJECT_SIZE, OBJECT_SIZE), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    )
    return np.clip(np.asarray(turned, dtype=np.float32), 0, 1)


def _hatching(rng: np.random.Generator) -> NDArray[np.float32]:
    rows, cols = np.mgrid[0:OBJECT_SIZE, 0:OBJECT_SIZE]
    phase = (rows, cols, rows + cols, rows - cols)[int(rng.integers(4))]
    return np.asarray((phase // 2) % 3 == 0, dtype=np.float32) * np.float32(0.85)


@cache
def _handwriting() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The UCI digits as opacities [1797, 16, 16] and their classes [1797]."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    opacities = [np.clip(_resized(image.reshape(8, 8).astype(np.float32) / 16, OBJECT_SIZE), 0, 1) for image in images]
    return np.stack(opacities), classes


@cache
def _shape_alpha(name: str, size: int) -> NDArray[np.float32]:
    """Opacity [16, 16] of a centred shape, antialiased by 4 x 4 samples a pixel."""
    ticks = (np.arange(4 * OBJECT_SIZE) + 0.5) / 4 - OBJECT_SIZE / 2
    y, x = np.meshgrid(ticks, ticks, indexing="ij")
    half = size / 2
    inside = {
        "disc": x**2 + y**2 <= half**2,
        "square": np.maximum(abs(x), abs(y)) <= 0.86 * half,
        "triangle": (abs(x) <= (y + half) / 2) & (y <= half),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.3 * half) & (np.maximum(abs(x), abs(y)) <= half),
    }[name]
    return np.asarray(inside.reshape(OBJECT_SIZE, 4, OBJECT_SIZE, 4).mean(axis=(1, 3)), dtype=np.float32)


def _resized(values: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC))
