"""Infidelity and sensitivity: does a map add up to what removals do, and hold still when the picture hardly moves.

    infidelity  = min over b of E_I (b sum over n in I of phi_n - (f(Z) - f(Z without I)))^2
    sensitivity = max over e, |e| <= radius, of ||phi(x + e) - phi(x)|| / ||phi(x)||

(Yeh et al., NeurIPS 2019, arXiv 1901.09392, sections 3 and 4, as captum computes them.) I is a set of patches, f the
explained class's output on a coalition. Maps come in units of their own, so b is fitted for each picture (captum's
`normalize`); the paper's definition has b = 1. b may be negative: a map and its negative have one infidelity.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tve.baselines.method import generator_of
from tve.baselines.perturbation import class_values, require_keys
from tve.coalitions import require_whole
from tve.evaluator import CoalitionEvaluator
from tve.fidelity.road import require_maps
from tve.fidelity.scores import Name, ScoredMap
from tve.transfer_rule import Output

# Pictures [M, 3, S, S], all of them versions of the picture of this key, to maps [M, P, P].
Explain = Callable[[Tensor, str], Tensor]


@torch.no_grad()
def infidelity(
    evaluator: CoalitionEvaluator,
    images_B3SS: Tensor,
    keys: Sequence[str],
    maps: Mapping[Name, ScoredMap],
    num_sets: int,
    seed: int,
    output: Output = "probability",
) -> dict[Name, Tensor]:
    """Infidelity [B], float64, of several maps of the same pictures; at least 0, lower is better.

    The unit is the output's, squared. The worst that a map can get, and a map of zeros gets, is the mean square of
    f(Z) - f(Z without I).

    Args:
        evaluator: backbone and removal operator. All maps share 1 + num_sets evaluations a picture.
        images_B3SS: normalised pictures.
        keys: their names; the sets of a picture depend on (seed, key) alone.
        maps: what to score, under any names; maps may differ in head and class.
        num_sets: sets drawn for each picture.
        seed: of the sets.
        output: what f is.

    Raises:
        ValueError: another number of keys, maps of another shape than [B, P, P] or not finite, no sets, or a head or
            class that does not fit.
    """
    require_keys(images_B3SS, keys)
    patches = evaluator.backbone.patches_per_side
    require_maps(maps, len(images_B3SS), patches)
    _require_positive(num_sets=num_sets)
    scores = {name: torch.empty(len(keys), dtype=torch.float64, device=images_B3SS.device) for name in maps}
    # One picture a call: the arithmetic of a score, to the last bit, is then the same in every batch.
    for index, key in enumerate(keys):
        removed_KN = removed_sets(num_sets, patches**2, generator_of(seed, key, "infidelity"))
        present_UN = torch.cat([torch.ones_like(removed_KN[:1]), ~removed_KN])  # the whole picture first
        present_1UPP = present_UN.unflatten(1, (patches, patches))[None].to(images_B3SS.device)
        embeddings_UD = evaluator(images_B3SS[index : index + 1], present_1UPP)[0]
        for name, scored in maps.items():
            values_U = class_values(scored.head, embeddings_UD, scored.target_B[index : index + 1], output)
            scores[name][index] = infidelity_of(scored.map_BPP[index], removed_KN, values_U)
    return scores


def removed_sets(num_sets: int, num_patches: int, generator: torch.Generator) -> Tensor:
    """Sets of patches to remove, bool [K, N]: a size, uniform over 1 to N - 1, then patches, uniform at that size."""
    rank_KN = torch.rand(num_sets, num_patches, generator=generator).argsort(1).argsort(1)
    return rank_KN < torch.randint(1, num_patches, (num_sets, 1), generator=generator)


def infidelity_of(map_PP: Tensor, removed_KN: Tensor, values_U: Tensor) -> Tensor:
    """Infidelity, float64, from the outputs [1 + K] of the whole picture and of it without each of these sets."""
    # Imported where it is used: captum comes with the pipeline, and the library imports without it.
    from captum import metrics

    # In float64: captum expands the square, and what is left of a good map is a small difference.
    map_1N, values_U = map_PP.double().cpu().reshape(1, -1), values_U.double().cpu()
    removed_KN = removed_KN.double()

    def remove(present_KN: Tensor) -> tuple[Tensor, Tensor]:
        return removed_KN, present_KN - removed_KN

    def outputs(present_MN: Tensor) -> Tensor:
        if bool(present_MN.all()):
            return values_U[:1]
        assert torch.equal(present_MN, 1 - removed_KN), "captum asks for the sets as they were drawn"
        return values_U[1:]

    found_1: Tensor = metrics.infidelity(
        outputs, remove, torch.ones_like(map_1N), map_1N, n_perturb_samples=len(removed_KN), normalize=True
    )
    return found_1[0].clamp(min=0)  # rounding can fall below


@torch.no_grad()
def sensitivity(
    explain: Explain, images_B3SS: Tensor, keys: Sequence[str], radius: float, num_draws: int, seed: int
) -> Tensor:
    """The largest relative change [B] of a picture's map among draws from the ball around it; lower is better.

    0 is a map that does not move, 1 a change as large as the map. The norm is Euclidean; a map of zeros counts as one
    of norm 1 (captum). A map that says nothing, such as a centre Gaussian, has 0: read it beside fidelity.

    Args:
        explain: called twice a picture, with the picture and with all its draws; 1 + num_draws explanations in all.
            It explains the class of the picture as it was, and should draw by the key, so that the change is the
            picture's.
        images_B3SS: normalised pictures.
        keys: their names; the draws of a picture depend on (seed, key) alone.
        radius: of the ball in the maximum norm, in normalised pixels; draws are uniform in it.
        num_draws: of each picture.
        seed: of the draws.

    Raises:
        ValueError: another number of keys, no draws, a radius below 0, or an explanation without one map a picture.
    """
    require_keys(images_B3SS, keys)
    _require_positive(num_draws=num_draws)
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius: expected a finite number, at least 0, got {radius}")
    changes_B = images_B3SS.new_empty(len(keys))
    for index, key in enumerate(keys):
        image_13SS, generator = images_B3SS[index : index + 1], generator_of(seed, key, "sensitivity")
        unit_K3SS = 2 * torch.rand(num_draws, *image_13SS.shape[1:], generator=generator) - 1
        changes_B[index] = _largest_change(explain, image_13SS, key, (radius * unit_K3SS).to(image_13SS))
    return changes_B


def _largest_change(explain: Explain, image_13SS: Tensor, key: str, noise_K3SS: Tensor) -> Tensor:
    from captum import metrics

    def explained(images_M3SS: Tensor | tuple[Tensor]) -> tuple[Tensor]:
        # captum gives the picture itself as a tuple of one, its draws as a tensor; and it turns gradients off.
        images_M3SS = images_M3SS[0] if isinstance(images_M3SS, tuple) else images_M3SS
        with torch.enable_grad():
            map_MPP = explain(images_M3SS, key).detach()
        if map_MPP.ndim != 3 or len(map_MPP) != len(images_M3SS):
            raise ValueError(f"explain: expected maps [{len(images_M3SS)}, P, P], got {list(map_MPP.shape)}")
        return (map_MPP.contiguous(),)

    def moved(images_K3SS: Tensor) -> Tensor:
        return images_K3SS + noise_K3SS

    change_1: Tensor = metrics.sensitivity_max(explained, image_13SS, moved, n_perturb_samples=len(noise_K3SS))
    return change_1[0]


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        require_whole(name, number)
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
