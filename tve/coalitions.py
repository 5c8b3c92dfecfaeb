"""Coalitions: which patches of a picture are present. True = present, everywhere.

N_r(p, q) = {(i, j) : |i - p| <= r and |j - q| <= r}, clipped at the border (TVE, arXiv 2312.15359, section 3).
Patches are indexed row-major: patch (p, q) of a P x P grid has index p * P + q, row first, in every tensor.
"""

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class WindowCoalitions:
    """Coalitions that are windows of one family, by their centres: no mask is built for them.

    Both tensors have the same shape: [B, K] for K coalitions of each picture, [M] for any number of each.

    Raises:
        ValueError: tensors of another dtype, or of different shapes or devices.
    """

    windows: Windows
    centre: Tensor  # int64, p * P + q
    kept: Tensor  # bool; True: the window alone (g). False: all but the window (h)

    def __post_init__(self) -> None:
        for name, tensor, dtype in (("centre", self.centre, torch.int64), ("kept", self.kept, torch.bool)):
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: expected a tensor of {dtype}, got {got}")
        if self.centre.shape != self.kept.shape or self.centre.device != self.kept.device:
            raise ValueError(
                f"window coalitions: expected one sign a centre on one device, got centres {list(self.centre.shape)} "
                f"on {self.centre.device} and signs {list(self.kept.shape)} on {self.kept.device}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.centre.shape

    @property
    def device(self) -> torch.device:
        return self.centre.device

    def __getitem__(self, index: Tensor) -> "WindowCoalitions":
        return WindowCoalitions(self.windows, self.centre[index], self.kept[index])

    def reshape(self, *shape: int) -> "WindowCoalitions":
        return WindowCoalitions(self.windows, self.centre.reshape(*shape), self.kept.reshape(*shape))

    def sizes(self) -> Tensor:
        """Patches present in each coalition, int64 of this shape."""
        patches, radius = self.windows.patches_per_side, self.windows.radius
        row, column = self.centre // patches, self.centre % patches
        height, width = (
            (middle + radius).clamp(max=patches - 1) - (middle - radius).clamp(min=0) + 1 for middle in (row, column)
        )
        return torch.where(self.kept, height * width, self.windows.num_coalitions - height * width)

    def present(self) -> Tensor:
        """The masks bool [..., P, P], for what cannot do without them."""
        inside = self.windows.kept_NPP(self.centre.device)[self.centre]
        return inside == self.kept[..., None, None]


# Coalitions of pictures: masks bool [..., P, P], True = present, or windows by their centres.
Coalitions = Tensor | WindowCoalitions


def coalition_pairs(family: CoalitionFamily, index_BM: Tensor) -> Coalitions:
    """Of each picture the coalitions of these indices, then their complements: [B, 2 M] coalitions."""
    if isinstance(family, Windows):
        kept_BK = torch.ones_like(index_BM, dtype=torch.bool)
        return WindowCoalitions(family, torch.cat([index_BM, index_BM], dim=1), torch.cat([kept_BK, ~kept_BK], dim=1))
    kept_BMPP = family.kept_NPP(index_BM.device)[index_BM]
    return torch.cat([kept_BMPP, ~kept_BMPP], dim=1)


def on_finer_grid(present: Tensor, cells: int) -> Tensor:
    """Masks [..., P, P] on a grid of which `cells` x `cells` places make a patch: [..., P * cells, P * cells]."""
    return present.repeat_interleave(cells, -2).repeat_interleave(cells, -1)


def random_halves(num_pictures: int, patches_per_side: int, generator: torch.Generator) -> Tensor:
    """Bool [B, P, P]: half of the patches (rounded down) of each picture, drawn uniformly by a CPU generator."""
    num_patches = patches_per_side**2
    rank_BN = torch.rand(num_pictures, num_patches, generator=generator).argsort(1).argsort(1)
    return (rank_BN < num_patches // 2).reshape(num_pictures, patches_per_side, patches_per_side)


def require_whole(name: str, value: object) -> None:
    """Raises ValueError unless `value` is an int, of Python's own type."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected a whole number (int), got {value!r}")


def require_coalitions(
    coalitions: Coalitions, leading: tuple[int | str, ...], patches_per_side: int, device: torch.device
) -> None:
    """Raises ValueError unless these are coalitions on a P x P grid and on the device of their pictures.

    Args:
        coalitions: masks [*leading, P, P] or windows of shape `leading`.
        leading: the expected leading sizes; a string names one that is free.
        patches_per_side: P.
        device: where the pictures are.
    """
    grid = (patches_per_side, patches_per_side)
    if isinstance(coalitions, WindowCoalitions):
        kind, expected = "windows", f"windows {_sizes(leading)} on a grid {_sizes(grid)}"
        shape, given = coalitions.shape, (*coalitions.shape, *(coalitions.windows.patches_per_side,) * 2)
        shown = f"windows {_sizes(shape)} on a grid {_sizes(given[-2:])}"
    elif isinstance(coalitions, Tensor):
        kind, expected = str(coalitions.dtype).removeprefix("torch."), f"bool {_sizes((*leading, *grid))}"
        given, shown = tuple(coalitions.shape), f"{kind} {_sizes(coalitions.shape)}"
    else:
        raise ValueError(
            f"coalitions: expected bool {_sizes((*leading, *grid))} or WindowCoalitions, got "
            f"{type(coalitions).__name__}"
        )
    wanted = (*leading, *grid)
    fits = len(given) == len(wanted) and all(
        isinstance(want, str) or got == want for got, want in zip(given, wanted, strict=True)
    )
    if kind not in ("bool", "windows") or not fits:
        raise ValueError(f"coalitions: expected {expected}, got {shown}; True = present")
    if coalitions.device != device:
        raise ValueError(f"coalitions: expected {device}, where the pictures are, got {coalitions.device}; move them")
    if isinstance(coalitions, WindowCoalitions) and coalitions.centre.numel():
        low, high = (int(value) for value in coalitions.centre.aminmax())
        if low < 0 or high >= patches_per_side**2:
            raise ValueError(
                f"centre: expected 0 to {patches_per_side**2 - 1} (p * P + q), got {low if low < 0 else high}"
            )


def _sizes(sizes: Sequence[int | str]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"
