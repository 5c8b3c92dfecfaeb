"""Maps that know nothing of the model: what an explanation has to beat.

`random`          independent noise.
`random_blurred`  the same noise under the window mean: removal metrics reward blur (arXiv 2304.13836).
`centre`          a Gaussian about the middle: photographs are centred on their object.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tve.transfer_rule import window_mean

CONTROLS = ("random", "random_blurred", "centre")


def control_maps(keys: Sequence[str], patches_per_side: int, radius: int, seed: int) -> dict[str, Tensor]:
    """The controls "random", "random_blurred" and "centre" of some pictures, each float32 [B, P, P].

    Args:
        keys: the pictures' names; a picture's map depends on (seed, key) alone, not on its place in a batch.
        patches_per_side: P.
        radius: of the windows that blur.
        seed: of the noise.
    """
    random_BPP = torch.stack([random_map(key, patches_per_side, seed) for key in keys])
    return {
        "random": random_BPP,
        "random_blurred": window_mean(random_BPP[:, None], radius)[:, 0],
        "centre": centre_map(patches_per_side).expand(len(keys), -1, -1),
    }


def random_map(key: str, patches_per_side: int, seed: int) -> Tensor:
    """Uniform noise [P, P], a pure function of (seed, key)."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest))
    return torch.from_numpy(rng.random((patches_per_side, patches_per_side), dtype=np.float32))


def centre_map(patches_per_side: int) -> Tensor:
    """A Gaussian [P, P] about the middle of the picture, a quarter of its side wide, 1 at its peak."""
    offset = torch.arange(patches_per_side) - (patches_per_side - 1) / 2
    squared_PP = offset[:, None] ** 2 + offset[None, :] ** 2
    return torch.exp(-squared_PP / (2 * (patches_per_side / 4) ** 2))
