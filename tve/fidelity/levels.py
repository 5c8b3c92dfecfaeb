"""Nested levels of a map: S*, the patches of highest score, at each of a grid of fractions.

Level f holds the round(f * P^2) patches of highest score. Equal scores are broken by one pseudo-random order
of positions that is the same for every map, method and machine, so that ties favour no region of the picture.
"""

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def nested_levels(scores_MPP: Tensor, fractions: Sequence[float]) -> Tensor:
    """The top patches of each map at each fraction: bool [M, F, P, P], True in S*. Levels are nested.

    Args:
        scores_MPP: maps; higher is more important.
        fractions: between 0 and 1, exclusive.

    Raises:
        ValueError: a map that is not square or not finite, or a level with no patch or with all.
    """
    if scores_MPP.ndim != 3 or scores_MPP.shape[1] != scores_MPP.shape[2]:
        raise ValueError(f"maps: expected [M, P, P], got {list(scores_MPP.shape)}")
    if num_bad := int((~scores_MPP.isfinite()).sum()):
        raise ValueError(f"maps: expected finite scores, got {num_bad} that are not")
    patches_per_side = scores_MPP.shape[-1]
    sizes = level_sizes(fractions, patches_per_side**2)
    rank_MN = ranks(scores_MPP.flatten(1))
    sizes_F = torch.tensor(sizes, device=scores_MPP.device)
    return (rank_MN[:, None] < sizes_F[:, None]).reshape(-1, len(sizes), patches_per_side, patches_per_side)


def level_sizes(fractions: Sequence[float], num_patches: int) -> tuple[int, ...]:
    """round(fraction * num_patches), for each fraction.

    >>> level_sizes([0.1, 0.5, 0.9], 64)
    (6, 32, 58)

    Raises:
        ValueError: no fractions, or a level that holds no patch or all of them.
    """
    sizes = tuple(round(fraction * num_patches) for fraction in fractions)
    outside = [f for f, size in zip(fractions, sizes, strict=True) if not 0 < size < num_patches]
    if not sizes or outside:
        raise ValueError(
            f"fractions: expected some that give 1 to {num_patches - 1} of {num_patches} patches, "
            f"got {outside or list(fractions)}"
        )
    return sizes


def ranks(scores_MN: Tensor) -> Tensor:
    """The place [M, N] of each patch in its map's order, 0 for the highest score."""
    tie_order_N = torch.tensor(_tie_order(scores_MN.shape[1]), device=scores_MN.device)
    order_MN = tie_order_N[scores_MN[:, tie_order_N].argsort(dim=1, descending=True, stable=True)]
    return order_MN.argsort(dim=1)


@cache
def _tie_order(num_patches: int) -> tuple[int, ...]:
    """A permutation of the positions; from a digest, since library generators may change between versions."""
    return tuple(sorted(range(num_patches), key=lambda n: hashlib.sha256(f"position {n}".encode()).digest()))
