"""Coalitions: which patches of a picture are present. True = present, everywhere.

N_r(p, q) = {(i, j) : |i - p| <= r and |j - q| <= r}, clipped at the border (TVE, arXiv 2312.15359, section 3).
Patches are indexed row-major: patch (p, q) of a P x P grid has index p * P + q, row first, in every tensor.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class CoalitionFamily(Protocol):
    """A set of N coalitions per picture, each paired with its complement, that an explainer learns to predict.

    The paper's family is `Windows`. Another family (random halves, Shapley coalitions) needs the same four members.
    """

    @property
    def radius(self) -> int:
        """How far a coalition reaches around its patch, in patches: what maps are averaged over. 0: no average."""
        ...

    @property
    def patches_per_side(self) -> int: ...

    @property
    def num_coalitions(self) -> int: ...

    def kept_NPP(self, device: torch.device | str = "cpu") -> Tensor:
        """Bool [N, P, P]: the patches of each coalition; its complement is what is left when it is taken away."""
        ...


@dataclass(frozen=True, slots=True)
class Windows:
    """The paper's family: one window N_r(p, q) around every patch, N = P * P."""

    patches_per_side: int
    radius: int

    def __post_init__(self) -> None:
        require_whole("patches_per_side", self.patches_per_side)
        require_whole("radius", self.radius)
        if self.patches_per_side < 1:
            raise ValueError(f"patches_per_side: expected at least 1, got {self.patches_per_side}")
        if not 0 <= self.radius < self.patches_per_side:
            raise ValueError(
                f"radius: expected 0 to {self.patches_per_side - 1} on a {self.patches_per_side} x "
                f"{self.patches_per_side} grid, got {self.radius}; a window must leave something out"
            )

    @property
    def num_coalitions(self) -> int:
        return self.patches_per_side**2

    def kept_NPP(self, device: torch.device | str = "cpu") -> Tensor:
        """Bool [N, P, P]; entry [p * P + q] is the window around patch (p, q).

        >>> Windows(patches_per_side=3, radius=1).kept_NPP()[0].int().tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
        """
        position = torch.arange(self.patches_per_side, device=device)
        near_PP = (position[:, None] - position[None, :]).abs() <= self.radius
        window_PPPP = near_PP[:, None, :, None] & near_PP[None, :, None, :]
        return window_PPPP.reshape(self.num_coalitions, self.patches_per_side, self.patches_per_side)


def random_halves(num_pictures: int, patches_per_side: int, generator: torch.Generator) -> Tensor:
    """Bool [B, P, P]: half of the patches (rounded down) of each picture, drawn uniformly by a CPU generator."""
    num_patches = patches_per_side**2
    rank_BN = torch.rand(num_pictures, num_patches, generator=generator).argsort(1).argsort(1)
    return (rank_BN < num_patches // 2).reshape(num_pictures, patches_per_side, patches_per_side)


def require_whole(name: str, value: object) -> None:
    """Raises ValueError unless `value` is an int, of Python's own type."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected a whole number (int), got {value!r}")


def require_coalitions(present_BKPP: Tensor, batch_size: int, patches_per_side: int) -> None:
    """Raises ValueError unless `present_BKPP` is bool [batch_size, K, P, P]."""
    expected = f"bool [{batch_size}, K, {patches_per_side}, {patches_per_side}]"
    shape = tuple(present_BKPP.shape)
    fits = len(shape) == 4 and shape[0] == batch_size and shape[2:] == (patches_per_side, patches_per_side)
    if present_BKPP.dtype != torch.bool or not fits:
        raise ValueError(f"coalitions: expected {expected}, got {present_BKPP.dtype} {list(shape)}")
