"""What it means that a patch is removed.

`zero`  its pixels are 0 after normalisation: defined for every backbone (the paper's choice).
`drop`  its token is left out of the sequence: plain vision transformers only. Equal, up to rounding, to forbidding
        attention to it, and free of the missingness bias of blank pixels (Jain et al., ICLR 2022, arXiv 2204.08945).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Removal = Literal["zero", "drop"]


def parse_removal(name: str) -> Removal:
    """Raises ValueError for a name that is no removal operator."""
    for known in get_args(Removal):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"removal: expected one of {list(get_args(Removal))}, got {name!r}")


def zero_pixels(images_B3SS: Tensor, present_BPP: Tensor) -> Tensor:
    """Normalised images [B, 3, S, S] with the pixels of absent patches set to 0.

    Raises:
        ValueError: the grid does not divide the picture.
    """
    size = images_B3SS.shape[-1]
    patches_per_side = present_BPP.shape[-1]
    if size % patches_per_side:
        raise ValueError(f"grid: expected a divisor of the picture's {size} pixels, got {patches_per_side} patches")
    pixels = size // patches_per_side
    present_B1SS = present_BPP.repeat_interleave(pixels, -2).repeat_interleave(pixels, -1)[:, None]
    return torch.where(present_B1SS, images_B3SS, images_B3SS.new_zeros(()))
