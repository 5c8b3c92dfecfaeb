"""The definition: the sum as PyTorch stores it, then the norm of what was stored."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def residual_norm(
    x_RD: Tensor,
    branch_RD: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    *,
    eps: float,
    kind: Literal["layer", "rms"],
) -> tuple[Tensor, Tensor]:
    """x + scale * branch, and its LayerNorm or RMSNorm over D; both [R, D] in the dtype of x.

    Where the norm's weights are of another dtype than x, the norm is computed in the wider one.
    """
    sum_RD = x_RD
    if branch_RD is not None:
        sum_RD = x_RD + branch_RD if scale_D is None else torch.addcmul(x_RD, branch_RD, scale_D)
        sum_RD = sum_RD.to(x_RD.dtype)
    wide = x_RD.dtype
    for given in (weight_D, bias_D):
        wide = wide if given is None else torch.promote_types(wide, given.dtype)
    weight_D = None if weight_D is None else weight_D.to(wide)
    bias_D = None if bias_D is None else bias_D.to(wide)
    shape = x_RD.shape[1:]
    if kind == "layer":
        normed_RD = functional.layer_norm(sum_RD.to(wide), shape, weight_D, bias_D, eps)
    else:
        normed_RD = functional.rms_norm(sum_RD.to(wide), shape, weight_D, eps)
    return sum_RD, normed_RD.to(x_RD.dtype)
