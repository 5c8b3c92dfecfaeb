"""The sets of coalitions that are timed: those that pre-training, exact windows and fidelity ask for.

Letters: B pictures, K coalitions of each, P patches per side, N = P * P. Every picture gets coalitions of its own where
they are random, and the same ones where they are windows.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tve.coalitions import Coalitions, WindowCoalitions, Windows, random_halves
from tve.removal import Removal

CaseName = Literal["kept", "removed", "pairs", "half", "fidelity", "zero"]
NAMES: tuple[CaseName, ...] = get_args(CaseName)
OF_WINDOWS: tuple[CaseName, ...] = ("kept", "removed", "pairs")  # these alone depend on the radius
EVERY = 8  # of the windows, where each costs nearly a full pass
LEVELS = tuple(level / 10 for level in range(1, 10))
SEED = 0


@dataclass(frozen=True, slots=True)
class Amounts:
    """How many coalitions a case has, and of how many pictures."""

    pictures: int
    halves: int  # of a picture
    orders: int  # of a picture, in `fidelity`: 18 coalitions each
    zeros: int  # of a picture, in `zero`

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


ON_A_CPU = Amounts(pictures=1, halves=24, orders=2, zeros=16)
ON_A_GPU = Amounts(pictures=64, halves=24, orders=2, zeros=16)


@dataclass(frozen=True, slots=True)
class Case:
    """Coalitions of some pictures under one removal operator."""

    name: CaseName
    removal: Removal
    radius: int | None  # of its windows; None where it has none
    coalitions: Coalitions  # [B, K] windows, or masks bool [B, K, P, P]

    @property
    def num_evaluations(self) -> int:
        return self.coalitions.shape[0] * self.coalitions.shape[1]


def case(name: CaseName, patches_per_side: int, radius: int, amounts: Amounts, device: torch.device | str) -> Case:
    """The case of this name, the same on every call.

    Raises:
        ValueError: an unknown name, or a window that leaves nothing out.
    """
    if name not in NAMES:
        raise ValueError(f"case: expected one of {list(NAMES)}, got {name!r}")
    pictures = amounts.pictures
    if name in OF_WINDOWS:
        windows = Windows(patches_per_side, radius)
        return Case(name, "drop", radius, _windows(name, windows, pictures, device))
    generator = torch.Generator().manual_seed(SEED)
    if name == "fidelity":
        present = _nested(pictures, amounts.orders, patches_per_side, generator)
        return Case(name, "drop", None, present.to(device))
    count = amounts.halves if name == "half" else amounts.zeros
    halves = random_halves(pictures * count, patches_per_side, generator).unflatten(0, (pictures, count))
    return Case(name, "drop" if name == "half" else "zero", None, halves.to(device))


def some(coalitions: Coalitions, chosen_k: Tensor) -> Coalitions:
    """Of each picture the coalitions of these indices."""
    if isinstance(coalitions, WindowCoalitions):
        return WindowCoalitions(coalitions.windows, coalitions.centre[:, chosen_k], coalitions.kept[:, chosen_k])
    return coalitions[:, chosen_k]


def masks(coalitions: Coalitions) -> Tensor:
    """Coalitions as masks, bool [..., P, P]."""
    return coalitions.present() if isinstance(coalitions, WindowCoalitions) else coalitions


def _windows(name: CaseName, windows: Windows, pictures: int, device: torch.device | str) -> WindowCoalitions:
    every = torch.arange(windows.num_coalitions, device=device)
    centre_K = every if name == "kept" else every[::EVERY]
    kept_K = torch.full_like(centre_K, name != "removed", dtype=torch.bool)
    if name == "pairs":
        centre_K, kept_K = torch.cat([centre_K, centre_K]), torch.cat([kept_K, ~kept_K])
    return WindowCoalitions(windows, centre_K.expand(pictures, -1), kept_K.expand(pictures, -1))


def _nested(pictures: int, orders: int, patches_per_side: int, generator: torch.Generator) -> Tensor:
    """Bool [B, 18 * orders, P, P]: of each random order the top 10 to 90 % of the patches, and what they leave."""
    num_patches = patches_per_side**2
    rank_BON = torch.rand(pictures, orders, num_patches, generator=generator).argsort(-1).argsort(-1)
    top_L = torch.tensor([round(level * num_patches) for level in LEVELS])
    top_BOLN = rank_BON[:, :, None] < top_L[:, None]
    both_BKN = torch.cat([top_BOLN, ~top_BOLN], dim=2).flatten(1, 2)
    return both_BKN.reshape(pictures, -1, patches_per_side, patches_per_side)
