"""The regression loss over drawn windows, by Triton or by PyTorch, and its gradient."""

from typing import Any

import torch
from torch import Tensor

from tve_kernels.backend import Backend
from tve_kernels.devices import require_one_device
from tve_kernels.window_loss import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def window_loss(
    predicted_BND: Tensor, target_BMD: Tensor, index_BM: Tensor, norm_DD: Tensor, *, backend: Backend
) -> Tensor:
    """The mean of the squares of (predicted - target) @ norm over the drawn windows: a scalar, float32.

    With "triton", the gradient goes to predicted alone, is zero at windows that were not drawn, adds where one was
    drawn twice, and has predicted's dtype. The same numbers on every run: nothing is added by atomics.

    Args:
        predicted_BND: float32, bfloat16 or float16, of every window.
        target_BMD: float32, of the drawn windows; no gradient.
        index_BM: int64, the drawn windows, 0 to N - 1. With "triton" another one makes the loss NaN (to look before
            would wait for the device); with "torch" it is an error of PyTorch.
        norm_DD: float32, any linear map; no gradient.
        backend: "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, no drawn window, or a gradient asked of
            target or norm.
    """
    _check(predicted_BND, target_BMD, index_BM, norm_DD)
    if backend == "torch":
        return reference.window_loss(predicted_BND, target_BMD, index_BM, norm_DD)
    loss: Tensor = _window_loss(predicted_BND, target_BMD, index_BM, norm_DD)[0]
    return loss


@torch.library.custom_op("tve::window_loss", mutates_args=())
def _window_loss(predicted_BND: Tensor, target_BMD: Tensor, index_BM: Tensor, norm_DD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the errors under the norm [B * M, D], which the gradient is made of."""
    from tve_kernels.window_loss import kernel

    return kernel.forward(predicted_BND, target_BMD, index_BM, norm_DD)


@_window_loss.register_fake
def _(predicted_BND: Tensor, target_BMD: Tensor, index_BM: Tensor, norm_DD: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = index_BM.numel(), predicted_BND.shape[2]
    return norm_DD.new_empty(()), norm_DD.new_empty((num_rows, width))


@torch.library.custom_op("tve::window_loss_backward", mutates_args=())
def _window_loss_backward(
    grad: Tensor, error_RD: Tensor, index_BM: Tensor, norm_DD: Tensor, num_windows: int, dtype: torch.dtype
) -> Tensor:
    """The gradient with respect to predicted, [B, N, D]."""
    from tve_kernels.window_loss import kernel

    return kernel.backward(grad, error_RD, index_BM, norm_DD, num_windows, dtype)


@_window_loss_backward.register_fake
def _(
    grad: Tensor, error_RD: Tensor, index_BM: Tensor, norm_DD: Tensor, num_windows: int, dtype: torch.dtype
) -> Tensor:
    return error_RD.new_empty((index_BM.shape[0], num_windows, error_RD.shape[1]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    predicted_BND, _, index_BM, norm_DD = inputs
    ctx.save_for_backward(output[1], index_BM, norm_DD)
    ctx.num_windows, ctx.dtype = predicted_BND.shape[1], predicted_BND.dtype
    ctx.set_materialize_grads(False)  # nothing flows into the errors: no zeros [B * M, D] for it


def _backward(ctx: Any, grad: Tensor, grad_error: Tensor | None) -> tuple[Tensor, None, None, None]:
    error_RD, index_BM, norm_DD = ctx.saved_tensors
    return _window_loss_backward(grad, error_RD, index_BM, norm_DD, ctx.num_windows, ctx.dtype), None, None, None


_window_loss.register_autograd(_backward, setup_context=_setup)


def _check(predicted_BND: Tensor, target_BMD: Tensor, index_BM: Tensor, norm_DD: Tensor) -> None:
    if predicted_BND.ndim != 3 or predicted_BND.dtype not in DTYPES:
        raise ValueError(
            f"predicted: expected [B, N, D], one of {list(DTYPES)}, "
            f"got {predicted_BND.dtype} {list(predicted_BND.shape)}; cast it"
        )
    batch_size, _, width = predicted_BND.shape
    if index_BM.ndim != 2 or index_BM.shape[0] != batch_size or index_BM.dtype != torch.int64:
        raise ValueError(f"index: expected int64 [{batch_size}, M], got {index_BM.dtype} {list(index_BM.shape)}")
    if not index_BM.numel() or not width:
        raise ValueError(
            f"index: expected at least one drawn window of at least one number, got {list(index_BM.shape)} "
            f"of width {width}; a mean over nothing is no loss"
        )
    expected = {"target": (target_BMD, [*index_BM.shape, width]), "norm": (norm_DD, [width, width])}
    for name, (tensor, shape) in expected.items():
        if list(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32 {shape}, got {tensor.dtype} {list(tensor.shape)}")
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a constant, got a tensor that requires a gradient; detach it")
    require_one_device("predicted", predicted_BND, {"target": target_BMD, "index": index_BM, "norm": norm_DD})
