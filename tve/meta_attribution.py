"""The meta-attribution of a picture: what each window says alone (g) and what is left without it (h).

    g[p, q] = G(x_{N_r(p, q)})          h[p, q] = G(x_{Z \\ N_r(p, q)})         (TVE, arXiv 2312.15359, section 3)

`exact_windows` evaluates all 2 P^2 coalitions. An explainer predicts the same object in one forward pass; whatever
reads a `MetaAttribution` cannot tell which of the two made it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tve.coalitions import CoalitionFamily, coalition_pairs, require_whole
from tve.evaluator import CoalitionEvaluator


@dataclass(frozen=True, slots=True)
class MetaAttribution:
    """Embeddings that any head can be read over. N = P * P, row-major; all float32.

    Raises:
        ValueError: a radius that is no whole number, or below 0.
    """

    kept_BND: Tensor  # g: only the window around patch n is kept
    removed_BND: Tensor  # h: the window around patch n is taken away
    full_BD: Tensor  # G(x)
    empty_D: Tensor  # G(∅)
    radius: int  # of the windows, patches

    def __post_init__(self) -> None:
        require_whole("radius", self.radius)
        if self.radius < 0:
            raise ValueError(f"radius: expected at least 0, got {self.radius}")

    def __getitem__(self, pictures: slice | Tensor) -> "MetaAttribution":
        """That of some of the pictures."""
        parts = (self.kept_BND[pictures], self.removed_BND[pictures], self.full_BD[pictures])
        return MetaAttribution(*parts, self.empty_D, self.radius)


def exact_windows(
    evaluator: CoalitionEvaluator, images_B3SS: Tensor, family: CoalitionFamily, empty_D: Tensor | None = None
) -> MetaAttribution:
    """The exact meta-attribution of each picture: 2 N evaluations a picture.

    Args:
        evaluator: backbone and removal operator.
        images_B3SS: normalised pictures.
        family: the coalitions, `Windows` in the paper.
        empty_D: G(∅) if it is at hand; evaluated otherwise.

    Raises:
        ValueError: images of another form than [B, 3, S, S], or a grid that is not the backbone's.
    """
    evaluator.backbone.require_images(images_B3SS)
    every_BN = torch.arange(family.num_coalitions, device=images_B3SS.device).expand(len(images_B3SS), -1)
    kept_BND, removed_BND = evaluator(images_B3SS, coalition_pairs(family, every_BN)).chunk(2, dim=1)
    full_BD = evaluator.full(images_B3SS)
    empty_D = evaluator.empty() if empty_D is None else empty_D
    return MetaAttribution(kept_BND, removed_BND, full_BD, empty_D, family.radius)
