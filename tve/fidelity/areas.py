"""Insertion and deletion: areas under p(y|x_S) over the nested levels of fidelity, which are evaluated already.

    insertion = integral over f in [0, 1] of p(y|x with S*_f only)      from p(y|∅) to p(y|x); higher is better
    deletion  = integral over f in [0, 1] of p(y|x without S*_f)        from p(y|x) to p(y|∅); lower is better

(RISE: Petsiuk et al., arXiv 1806.07421, section 4, where single pixels are blurred or greyed.) Integrals are trapezoids
between the shares of patches that levels hold, round(f * N) / N, so that rounding does not bend them.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tve.fidelity.levels import level_sizes
from tve.fidelity.scores import Fidelity


def insertion_area(
    fidelity: Fidelity, full_B: Tensor, empty_B: Tensor, fractions: Sequence[float], num_patches: int
) -> Tensor:
    """The area [B] under p(y|x with S* only), 0 to 1, higher is better.

    Args:
        fidelity: of a map, at these fractions.
        full_B: p(y|x), of the class and the head of the map.
        empty_B: p(y|∅): `target_probability` of the evaluator's `empty()`.
        fractions: the grid of levels that `fidelity` was measured at, ascending.
        num_patches: N, of the grid of the map.

    Raises:
        ValueError: fractions that do not ascend, or another number of them or of pictures than in `fidelity`.
    """
    return _area(empty_B, full_B, fidelity.kept_drop_BF, full_B, fractions, num_patches)


def deletion_area(
    fidelity: Fidelity, full_B: Tensor, empty_B: Tensor, fractions: Sequence[float], num_patches: int
) -> Tensor:
    """The area [B] under p(y|x without S*), 0 to 1, lower is better; arguments and errors as of `insertion_area`."""
    return _area(full_B, empty_B, fidelity.removed_drop_BF, full_B, fractions, num_patches)


def _area(
    first_B: Tensor, last_B: Tensor, drop_BF: Tensor, full_B: Tensor, fractions: Sequence[float], num_patches: int
) -> Tensor:
    """The area [B] under first, full - drop at the levels, last."""
    if any(low >= high for low, high in pairwise(fractions)):
        raise ValueError(f"fractions: expected ascending ones, got {list(fractions)}; sort them before fidelity")
    sizes = level_sizes(fractions, num_patches)
    expected = (len(full_B), len(sizes))
    if tuple(drop_BF.shape) != expected or first_B.shape != last_B.shape:
        raise ValueError(
            f"fidelity: expected drops {list(expected)} and probabilities [{expected[0]}], got {list(drop_BF.shape)}, "
            f"{list(first_B.shape)} and {list(last_B.shape)}"
        )
    share_E = torch.tensor([0, *sizes, num_patches], dtype=drop_BF.dtype, device=drop_BF.device) / num_patches
    probability_BE = torch.cat([first_B[:, None], full_B[:, None] - drop_BF, last_B[:, None]], dim=1)
    return torch.trapezoid(probability_BE, share_E, dim=1)
