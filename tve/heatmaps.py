"""Heatmaps over their pictures.

An overlay never hides its picture: the picture turns grey, and colour covers a patch in proportion to |phi| alone.
Red speaks for the class, blue against it, and a patch of attribution 0 stays as it was.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

FOR_RGB = (203, 24, 29)
AGAINST_RGB = (33, 102, 172)
MAX_OPACITY = 0.72


def overlay(
    picture: "Image.Image | NDArray[np.uint8]",
    phi_PP: "NDArray[np.floating[Any]] | Tensor",
    limit: float | None = None,
    size: int = 256,
) -> NDArray[np.uint8]:
    """A heatmap over its picture, uint8 [size, size, 3]; patch (p, q) is row p, column q.

    Args:
        picture: as the model saw it, square: a PIL image, or uint8 [S, S, 3] such as `backbone.pixels(image)`.
        phi_PP: attributions in any unit, an array or a tensor on any device; the scale is diverging and centred at
            zero.
        limit: the |phi| that takes full colour; the map's own largest where None.
        size: pixels of a side, enlarged to a multiple of P.

    Raises:
        ValueError: wrong shapes, or attributions that are not finite.
    """
    pixels, phi_PP = _square_picture(picture), _finite_map(phi_PP)
    patches = phi_PP.shape[0]
    size = patches * -(-size // patches)
    # Half luminance, half the brightest channel: a coloured object of the background's luminance stays visible.
    brightness = (np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32) + pixels.max(axis=2)) / 2
    grey = np.asarray(Image.fromarray(brightness).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255)
    # Lifted to the upper half of the scale: colour of one opacity then looks alike on dark and on light parts.
    canvas = np.repeat((70 + grey * np.float32(185 / 255))[..., None], 3, axis=2)

    largest = float(np.abs(phi_PP).max()) if limit is None else limit
    strength_PP = np.clip(phi_PP / largest, -1, 1) if largest > 0 else np.zeros_like(phi_PP)
    strength = strength_PP.repeat(size // patches, axis=0).repeat(size // patches, axis=1)[..., None]
    colour = np.where(strength > 0, np.array(FOR_RGB, np.float32), np.array(AGAINST_RGB, np.float32))
    opacity = MAX_OPACITY * np.abs(strength)
    return np.asarray(np.rint(canvas + opacity * (colour - canvas)).clip(0, 255), dtype=np.uint8)


def enlarged(picture: NDArray[np.uint8], size: int = 256) -> NDArray[np.uint8]:
    """The picture in colour at an overlay's size, uint8 [size, size, 3]."""
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


def _square_picture(picture: "Image.Image | NDArray[np.uint8]") -> NDArray[np.uint8]:
    pixels = np.asarray(picture.convert("RGB")) if isinstance(picture, Image.Image) else _array(picture)
    shape = pixels.shape
    if pixels.dtype != np.uint8 or len(shape) != 3 or shape[0] != shape[1] or shape[2] != 3:
        raise ValueError(
            "picture: expected a square picture as the model saw it, uint8 [S, S, 3], got "
            f"{pixels.dtype} {list(shape)}; backbone.pixels(image) gives it"
        )
    return pixels


def _finite_map(phi_PP: "NDArray[np.floating[Any]] | Tensor") -> NDArray[np.float32]:
    values_PP = np.asarray(_array(phi_PP), dtype=np.float32)
    shape = list(values_PP.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        hint = "; one map at a time, such as heatmap[0]" if len(shape) > 2 else ""
        raise ValueError(f"heatmap: expected [P, P], got {shape}{hint}")
    if not np.isfinite(values_PP).all():
        num_wrong = int((~np.isfinite(values_PP)).sum())
        raise ValueError(f"heatmap: expected finite attributions, got {num_wrong} that are not")
    return values_PP


def _array(values: Any) -> NDArray[Any]:
    """An array as it is, or a tensor's values; torch is not imported for it."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    tensor = values.detach().cpu()
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)  # NumPy has no bfloat16
