"""How far a predicted explanation can be from the exact one, from what pre-training leaves of its loss.

    |û[p, q] - u[p, q]|  <=  L (|w+| ||ĝ[p, q] - g[p, q]|| + |w-| ||ĥ[p, q] - h[p, q]||)      of a window
    |phi^ - phi|         <=  sum of |M[n, m]| times that over the windows m                    of a patch n
    rms |phi^ - phi|     <=  L sqrt(k (w+^2 + w-^2) loss)                                      of a picture

phi = M u: the window mean, shares, or u itself. loss is the paper's pre-training loss, the mean of ||ĝ - g||^2 +
||ĥ - h||^2 over the windows of the picture; k is the largest sum of |M| along a row times the largest along a column,
at least 1 for the mean, since windows near the border count unevenly. L is how fast the class's output l(e) can change:

    logit             ||W_y||                    its gradient in e is W_y
    probability       max_c ||W_y - W_c|| / 4    p_y (W_y - sum_c p_c W_c), and p_y (1 - p_y) <= 1/4
    log-probability   max_c ||W_y - W_c||        W_y - sum_c p_c W_c

That pre-training bounds the error of explanations is the paper's (TVE, arXiv 2312.15359); constants and proof are in
docs/method.md.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tve.meta_attribution import MetaAttribution
from tve.transfer_rule import (
    DEFAULT_RULE,
    Output,
    PerPatch,
    Target,
    TransferRule,
    class_maps,
    class_of_each,
    of_patches,
)


@dataclass(frozen=True, slots=True)
class Bound:
    """The error of maps and what bounds it; float64, in the unit of the rule's output, but for `loss_B`.

    Up to rounding, actual_BPP <= bound_BPP and actual_B <= bound_B <= from_loss_B. The root mean square of actual_BPP
    over a picture's patches is at most from_loss_B, too.
    """

    actual_BPP: Tensor  # |predicted map - exact map| of each patch
    bound_BPP: Tensor
    actual_B: Tensor  # means over the patches of a picture
    bound_B: Tensor
    from_loss_B: Tensor  # knows no more of a picture than its loss
    loss_B: Tensor  # ||ĝ - g||^2 + ||ĥ - h||^2, mean over windows: squared units of the embedding


@torch.no_grad()
def explanation_bound(
    predicted: MetaAttribution,
    exact: MetaAttribution,
    head: nn.Module,
    target: Target,
    rule: TransferRule = DEFAULT_RULE,
    *,
    lipschitz_B: Tensor | None = None,
) -> Bound:
    """The error of the maps of one class a picture, beside its bounds. All arithmetic is in float64.

    G(x) and G(∅) are taken from `exact` for both maps: they are evaluated, not predicted.

    Args:
        predicted: the explainer's.
        exact: of the same pictures and windows.
        head: linear, or any module in evaluation mode whose constant is given.
        target: one class for all pictures, or one a picture.
        rule: output, what a patch gets, weights.
        lipschitz_B: a Lipschitz constant of the rule's output of each picture's class in the embedding; `lipschitz`'s
            where it is not given.

    Raises:
        ValueError: meta-attributions of different form, a head that is not linear without a constant, constants of
            another shape or below 0, or what `class_maps` raises.
    """
    _require_alike(predicted, exact)
    num_pictures, num_windows = exact.kept_BND.shape[:2]
    target_B = class_of_each(target, num_pictures)
    if lipschitz_B is None:
        lipschitz_B = lipschitz(head, target_B, rule.output)
    elif tuple(lipschitz_B.shape) != (num_pictures,) or not bool((lipschitz_B >= 0).all()):
        raise ValueError(f"lipschitz: expected [{num_pictures}], at least 0, got {lipschitz_B.tolist()}")
    slope_B = lipschitz_B.to(exact.full_BD.device).double()

    # In float32 the difference of two maps that nearly agree would be rounding.
    head64 = copy.deepcopy(head).double()
    predicted64, exact64 = _in_float64(predicted, exact), _in_float64(exact, exact)
    actual_BPP = (class_maps(predicted64, head64, target_B, rule) - class_maps(exact64, head64, target_B, rule)).abs()

    kept_BN = (predicted64.kept_BND - exact64.kept_BND).norm(dim=-1)
    removed_BN = (predicted64.removed_BND - exact64.removed_BND).norm(dim=-1)
    windows_BN = slope_B[:, None] * (abs(rule.weight_kept) * kept_BN + abs(rule.weight_removed) * removed_BN)
    side = round(num_windows**0.5)
    weights_NM = patch_weights(side, exact.radius, rule.per_patch).abs().to(windows_BN.device)
    bound_BPP = (windows_BN @ weights_NM.T).unflatten(1, (side, side))

    loss_B = (kept_BN.square() + removed_BN.square()).mean(1)
    unevenness = float(weights_NM.sum(0).max() * weights_NM.sum(1).max())
    squared_weights = rule.weight_kept**2 + rule.weight_removed**2
    from_loss_B = slope_B * (unevenness * squared_weights * loss_B).sqrt()
    return Bound(actual_BPP, bound_BPP, actual_BPP.mean((1, 2)), bound_BPP.mean((1, 2)), from_loss_B, loss_B)


@torch.no_grad()
def lipschitz(head: nn.Module, target_B: Tensor, output: Output) -> Tensor:
    """The Lipschitz constants [B], float64, of a linear head's output of each class in the embedding, global in it.

    Args:
        head: linear.
        target_B: int64, classes.
        output: which of the head's outputs, as in a `TransferRule`.

    Raises:
        ValueError: a head that is not linear, or a class that it does not have.
    """
    # A subclass of nn.Linear may compute anything.
    if type(head) is not nn.Linear:
        raise ValueError(
            f"head: expected nn.Linear, got {type(head).__name__}, whose slope is not known; give lipschitz_B, for "
            "example the product of its layers' spectral norms, where every layer has a bounded slope"
        )
    if len(target_B) and not 0 <= int(target_B.min()) <= int(target_B.max()) < head.out_features:
        raise ValueError(f"class: expected 0 to {head.out_features - 1}, got {target_B.tolist()}")
    weight_CD = head.weight.double()
    weight_BD = weight_CD[target_B.to(weight_CD.device)]
    if output == "logit":
        norm_B: Tensor = weight_BD.norm(dim=1)
        return norm_B
    # By differences: the faster way through matrix products cancels where two classes are alike.
    distance_BC = torch.cdist(weight_BD, weight_CD, compute_mode="donot_use_mm_for_euclid_dist")
    farthest_B = distance_BC.amax(1)
    return farthest_B / 4 if output == "probability" else farthest_B


def patch_weights(patches_per_side: int, radius: int, per_patch: PerPatch) -> Tensor:
    """M of phi = M u: what each patch (row) gets of each window (column), float64 [N, N]."""
    num_patches = patches_per_side**2
    single_NPP = torch.eye(num_patches, dtype=torch.float64).unflatten(1, (patches_per_side, patches_per_side))
    return of_patches(single_NPP[None], radius, per_patch)[0].flatten(1).T.contiguous()


def _in_float64(meta: MetaAttribution, exact: MetaAttribution) -> MetaAttribution:
    """This one's windows beside the exact G(x) and G(∅), in float64."""
    device = exact.full_BD.device
    kept_BND, removed_BND = meta.kept_BND.to(device).double(), meta.removed_BND.to(device).double()
    return MetaAttribution(
        kept_BND, removed_BND, exact.full_BD.double(), exact.empty_D.to(device).double(), exact.radius
    )


def _require_alike(predicted: MetaAttribution, exact: MetaAttribution) -> None:
    forms = [
        f"g {list(meta.kept_BND.shape)}, h {list(meta.removed_BND.shape)}, radius {meta.radius}"
        for meta in (predicted, exact)
    ]
    if forms[0] != forms[1]:
        raise ValueError(f"predicted: expected the exact one's {forms[1]}, got {forms[0]}; compare the same windows")
