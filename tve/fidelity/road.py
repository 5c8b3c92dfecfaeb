"""ROAD, "remove and debias": removal by noisy linear imputation, which hides the mask's shape better than blank pixels.

    x_i   = sum over neighbours j of w_ij x_j / sum over j of w_ij + e_i         of each removed pixel i and channel
    score = mean over fractions of p(y|x, least relevant imputed) - p(y|x, most relevant imputed)     higher is better

w is 1/6 for direct and 1/12 for diagonal neighbours; beyond the border there are none. The equations of all removed
pixels are solved together; then comes e, Gaussian noise. (Rong et al., ICML 2022, arXiv 2202.00449; weights, border and
the noise's size are those of its released code, which removes pixels where patches are removed here.)

The matrix is symmetric and, since some pixels are always left, positive definite. It depends on the mask alone and is
factorised once for the three channels. On one core, at fractions .2 to .8, a mask took 2 to 10 ms for 64 x 64 pixels in
8 x 8 patches, and 20 to 240 ms for 224 x 224 in 14 x 14; a map has two masks a fraction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tve.baselines.method import generator_of
from tve.baselines.perturbation import require_keys
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.levels import nested_levels
from tve.fidelity.scores import Name, ScoredMap, target_probability

FRACTIONS = (0.2, 0.4, 0.6, 0.8)
NOISE = 0.01  # standard deviation, in normalised pixels


@dataclass(frozen=True, slots=True)
class RoadScore:
    """p(y|x with patches imputed) of each picture, at each fraction."""

    most_first_BF: Tensor  # the most relevant patches imputed (MoRF)
    least_first_BF: Tensor  # the least relevant ones (LeRF)

    @property
    def score_B(self) -> Tensor:
        """Mean of LeRF - MoRF, -1 to 1, higher is better."""
        return (self.least_first_BF - self.most_first_BF).mean(1)


@torch.no_grad()
def road(
    evaluator: CoalitionEvaluator,
    images_B3SS: Tensor,
    keys: Sequence[str],
    maps: Mapping[Name, ScoredMap],
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> dict[Name, RoadScore]:
    """ROAD of several maps of the same pictures; a mask that several maps of a picture share is imputed once.

    A map of equal scores gets 0: its least relevant patches are its most relevant ones.

    Args:
        evaluator: backbone and precision. Whole pictures alone are evaluated, so its removal operator plays no part.
        images_B3SS: normalised pictures.
        keys: their names; the noise of a picture depends on (seed, key) alone and is the same for all maps and masks.
        maps: what to score, under any names; maps may differ in head and class.
        fractions: of patches that are imputed.
        seed: of the noise.

    Raises:
        ValueError: another number of keys, maps of another shape than [B, P, P] or not finite, or fractions without
            patches.
    """
    require_keys(images_B3SS, keys)
    require_maps(maps, len(images_B3SS), evaluator.backbone.patches_per_side)
    if not maps:
        return {}
    removed_JB2FPP = torch.stack(
        [
            torch.stack([nested_levels(sign * scored.map_BPP, fractions) for sign in (1, -1)], dim=1)
            for scored in maps.values()
        ]
    )
    curves: dict[Name, list[Tensor]] = {name: [] for name in maps}
    # One picture at a time: its imputed copies are whole pictures, and there are many of them.
    for index, key in enumerate(keys):
        distinct_UPP, row_J2F = _distinct(removed_JB2FPP[:, index])
        noise_3SS = NOISE * torch.randn(images_B3SS.shape[1:], generator=generator_of(seed, key, "road"))
        imputed_U3SS = torch.stack([imputed(images_B3SS[index], mask_PP, noise_3SS) for mask_PP in distinct_UPP])
        embeddings_UD = evaluator.full(imputed_U3SS)
        for (name, scored), row_2F in zip(maps.items(), row_J2F, strict=True):
            target_1 = scored.target_B[index : index + 1]
            curves[name].append(target_probability(scored.head, embeddings_UD[row_2F][None], target_1)[0])
    if not len(keys):
        return {name: RoadScore(*torch.empty(2, 0, len(fractions))) for name in maps}
    return {name: RoadScore(*torch.stack(curve_B2F, dim=1)) for name, curve_B2F in curves.items()}


def imputed(image_3SS: Tensor, removed_PP: Tensor, noise_3SS: Tensor | None = None) -> Tensor:
    """The picture [3, S, S] with each removed pixel the weighted mean of its neighbours, plus its noise.

    Args:
        image_3SS: normalised.
        removed_PP: bool, True on removed patches; some are left.
        noise_3SS: added to removed pixels.
    """
    # Imported where it is used: scipy comes with the pipeline, and the library imports without it.
    from scipy.sparse.linalg import splu

    pixels = image_3SS.shape[-1] // removed_PP.shape[-1]
    removed_SS = removed_PP.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
    removed_Q, picture_Q3 = removed_SS.flatten().cpu().numpy(), image_3SS.flatten(1).T.double().cpu().numpy()
    equations = _laplacian(image_3SS.shape[-1])[removed_Q]
    # The settings for symmetric, positive definite matrices: order by the pattern of A, no pivoting.
    factors = splu(
        equations[:, removed_Q].tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    solution_M3 = torch.from_numpy(factors.solve(-(equations[:, ~removed_Q] @ picture_Q3[~removed_Q])))
    if noise_3SS is not None:
        solution_M3 += noise_3SS.flatten(1).T[torch.from_numpy(removed_Q)]
    result_3SS = image_3SS.clone()
    result_3SS[:, removed_SS] = solution_M3.T.to(image_3SS)
    return result_3SS


def require_maps(maps: Mapping[Name, ScoredMap], num_pictures: int, patches_per_side: int) -> None:
    """Raises ValueError unless each is a finite map [B, P, P]."""
    expected = (num_pictures, patches_per_side, patches_per_side)
    for name, scored in maps.items():
        if tuple(scored.map_BPP.shape) != expected:
            raise ValueError(f"map {name}: expected {list(expected)}, got {list(scored.map_BPP.shape)}")
        if num_bad := int((~scored.map_BPP.isfinite()).sum()):
            raise ValueError(f"map {name}: expected finite attributions, got {num_bad} that are not")


def _distinct(removed_J2FPP: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct masks [U, P, P], and each mask's place [J, 2, F] among them."""
    shape = removed_J2FPP.shape
    distinct_UN, row_M = torch.unique(removed_J2FPP.reshape(-1, shape[-1] ** 2).int(), dim=0, return_inverse=True)
    return distinct_UN.bool().reshape(-1, *shape[-2:]), row_M.reshape(shape[:-2])


@cache
def _laplacian(size: int) -> Any:
    """Sparse [S S, S S]: of each pixel its weights' sum, and -w for each neighbour; times a solution it is 0."""
    from scipy.sparse import diags_array, eye_array, kron

    same, beside = eye_array(size), diags_array([1.0, 1.0], offsets=[-1, 1], shape=(size, size))
    weights = (kron(same, beside) + kron(beside, same)) / 6 + kron(beside, beside) / 12
    return (diags_array(weights.sum(1)) - weights).tocsr()
