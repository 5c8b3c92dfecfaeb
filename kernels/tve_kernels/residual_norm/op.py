"""Residual and norm, by Triton or by PyTorch."""

from typing import Literal, get_args

import torch
from torch import Tensor

from tve_kernels.backend import Backend
from tve_kernels.devices import require_one_device
from tve_kernels.limits import WIDEST_ROW
from tve_kernels.residual_norm import reference

Kind = Literal["layer", "rms"]


def residual_norm(
    x_RD: Tensor,
    branch_RD: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    *,
    eps: float,
    kind: Kind,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """x + scale * branch [R, D] in the dtype of x, and its norm over D, also in the dtype of x. For inference.

    Statistics are of the sum as rounded to the dtype of x, in float32, as PyTorch's are.

    Args:
        x_RD: fp32, bf16 or fp16; the residual stream.
        branch_RD: same shape and dtype. None: the sum is x itself, not a copy.
        scale_D: of the branch (LayerScale), of any of these dtypes. None: 1.
        weight_D: of the norm, of any of these dtypes. None: 1.
        bias_D: of LayerNorm. None: 0.
        eps: is added to the variance (to the mean square).
        kind: "layer" subtracts the mean, "rms" does not.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree, a scale without branch, a bias of RMSNorm, an unknown
            kind, or more columns than the kernel can hold.
    """
    _require(x_RD, branch_RD, scale_D, weight_D, bias_D, kind)
    if backend == "torch":
        return reference.residual_norm(x_RD, branch_RD, scale_D, weight_D, bias_D, eps=eps, kind=kind)
    if x_RD.shape[1] > WIDEST_ROW:
        raise ValueError(f"x: expected at most {WIDEST_ROW} columns, got {x_RD.shape[1]}; use backend 'torch'")
    if branch_RD is None:
        return x_RD, _norm_op(x_RD, weight_D, bias_D, eps, kind == "rms")
    rows: tuple[Tensor, Tensor] = _residual_norm_op(x_RD, branch_RD, scale_D, weight_D, bias_D, eps, kind == "rms")
    return rows


@torch.library.custom_op("tve::residual_norm", mutates_args=())
def _residual_norm_op(
    x_RD: Tensor,
    branch_RD: Tensor,
    scale_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    from tve_kernels.residual_norm import kernel  # here alone, so that importing the package imports no Triton

    return kernel.residual_norm(x_RD, branch_RD, scale_D, weight_D, bias_D, eps, rms)


@_residual_norm_op.register_fake
def _(
    x_RD: Tensor,
    branch_RD: Tensor,
    scale_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), x_RD.new_empty(x_RD.shape)


# Apart from the other, because what an op returns may not be what it was given.
@torch.library.custom_op("tve::norm", mutates_args=())
def _norm_op(x_RD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, rms: bool) -> Tensor:
    from tve_kernels.residual_norm import kernel

    return kernel.residual_norm(x_RD, None, None, weight_D, bias_D, eps, rms)[1]


@_norm_op.register_fake
def _(x_RD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, rms: bool) -> Tensor:
    return x_RD.new_empty(x_RD.shape)


def _require(
    x_RD: Tensor,
    branch_RD: Tensor | None,
    scale_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    kind: Kind,
) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {list(get_args(Kind))}, got {kind!r}")
    if x_RD.ndim != 2 or not x_RD.is_floating_point():
        raise ValueError(f"x: expected floats [R, D], got {x_RD.dtype} {list(x_RD.shape)}")
    if branch_RD is None and scale_D is not None:
        raise ValueError("scale: expected None without a branch, got a tensor; it scales the branch alone")
    if kind == "rms" and bias_D is not None:
        raise ValueError("bias: expected None, for RMSNorm has none, got a tensor; use kind 'layer'")
    if branch_RD is not None and (branch_RD.dtype != x_RD.dtype or branch_RD.shape != x_RD.shape):
        raise ValueError(
            f"branch: expected {x_RD.dtype} {list(x_RD.shape)}, as x, got {branch_RD.dtype} {list(branch_RD.shape)}"
        )
    for name, given_D in (("scale", scale_D), ("weight", weight_D), ("bias", bias_D)):
        if given_D is not None and (given_D.shape != x_RD.shape[1:] or not given_D.is_floating_point()):
            raise ValueError(
                f"{name}: expected floats {list(x_RD.shape[1:])}, got {given_D.dtype} {list(given_D.shape)}"
            )
    require_one_device("x", x_RD, {"branch": branch_RD, "scale": scale_D, "weight": weight_D, "bias": bias_D})
