"""Fidelity: how much the prediction rests on the patches that a map ranks highest.

    fidelity+ = mean over levels of p(y|x) - p(y|x without S*)        higher is better
    fidelity- = mean over levels of p(y|x) - p(y|x with S* only)      lower is better

(TVE, arXiv 2312.15359, section 5.) G(x_S) depends on neither head nor method: a coalition that several maps
of one picture share is evaluated once, and every head reads the same embedding.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tve.evaluator import CoalitionEvaluator
from tve.fidelity.levels import nested_levels
from tve.transfer_rule import Head, read

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class ScoredMap:
    """One map a picture, and the prediction that it is to explain."""

    map_BPP: Tensor
    head: Head
    target_B: Tensor  # the class y whose probability is watched


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a map's levels do to p(y|x), for each picture."""

    removed_drop_BF: Tensor  # p(y|x) - p(y|x without S*), at each fraction
    kept_drop_BF: Tensor  # p(y|x) - p(y|x with S* only)

    @property
    def plus_B(self) -> Tensor:
        """Fidelity+, higher is better."""
        return self.removed_drop_BF.mean(1)

    @property
    def minus_B(self) -> Tensor:
        """Fidelity-, lower is better."""
        return self.kept_drop_BF.mean(1)


@torch.no_grad()
def fidelity(
    evaluator: CoalitionEvaluator,
    images_B3SS: Tensor,
    full_BD: Tensor,
    maps: Mapping[Name, ScoredMap],
    fractions: Sequence[float],
) -> dict[Name, Fidelity]:
    """Fidelity of several maps of the same pictures, under the evaluator's removal operator.

    Args:
        evaluator: backbone and removal operator.
        images_B3SS: normalised pictures.
        full_BD: their embeddings G(x).
        maps: what to score, under any names; maps may differ in head and class.
        fractions: the grid of levels.

    Raises:
        ValueError: maps of another shape than [B, P, P], or fractions without patches.
    """
    expected = (len(images_B3SS), evaluator.backbone.patches_per_side, evaluator.backbone.patches_per_side)
    for name, scored in maps.items():
        if tuple(scored.map_BPP.shape) != expected:
            raise ValueError(f"map {name}: expected {list(expected)}, got {list(scored.map_BPP.shape)}")
    if not maps:
        return {}
    top_JBFPP = torch.stack([nested_levels(scored.map_BPP, fractions) for scored in maps.values()])
    both_JB2FPP = torch.stack([~top_JBFPP, top_JBFPP], dim=2)
    embeddings_UD, row_JB2F = _evaluate_once(evaluator, images_B3SS, both_JB2FPP)
    scores = {}
    for (name, scored), row_B2F in zip(maps.items(), row_JB2F, strict=True):
        full_B11 = target_probability(scored.head, full_BD, scored.target_B)[:, None, None]
        drop_B2F = full_B11 - target_probability(scored.head, embeddings_UD[row_B2F], scored.target_B)
        scores[name] = Fidelity(*drop_B2F.unbind(1))
    return scores


@torch.no_grad()
def target_probability(head: Head, embeddings: Tensor, target_B: Tensor) -> Tensor:
    """p(y|·) [B, ...] of each picture's own class, on embeddings [B, ..., D]."""
    probability = read(head, embeddings, "probability")
    target = target_B.reshape(-1, *[1] * (probability.ndim - 1)).expand(*probability.shape[:-1], 1)
    return probability.gather(-1, target)[..., 0]


def _evaluate_once(evaluator: CoalitionEvaluator, images_B3SS: Tensor, present_JB2FPP: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [U, D] of the distinct (picture, coalition) rows, and each coalition's row [J, B, 2, F]."""
    shape = present_JB2FPP.shape[:-2]
    image_JB2F = torch.arange(shape[1], device=images_B3SS.device)[:, None, None].expand(shape)
    rows_MN = torch.cat([image_JB2F.reshape(-1, 1), present_JB2FPP.flatten(0, 3).flatten(1)], dim=1).int()
    distinct_UN, row_M = torch.unique(rows_MN, dim=0, return_inverse=True)
    present_UPP = distinct_UN[:, 1:].bool().unflatten(1, present_JB2FPP.shape[-2:])
    return evaluator.ragged(images_B3SS, distinct_UN[:, 0].long(), present_UPP), row_M.reshape(shape)
