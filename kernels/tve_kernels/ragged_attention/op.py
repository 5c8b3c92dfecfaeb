"""Softmax attention within each sequence of a ragged batch: what is called."""

import torch
from torch import Tensor

from tve_kernels.backend import Backend
from tve_kernels.layout import Ragged
from tve_kernels.limits import require_heads
from tve_kernels.ragged_attention import dense


def ragged_attention(
    q_RHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged, *, scale: float, backend: Backend
) -> Tensor:
    """Attended values [R, H, W] in the dtype of q: every row attends to the rows of its own sequence.

    Inference only: "triton" has no gradient. There, a number that is not finite in k or v also spoils other sequences
    that share a tile of the program with its own, possibly those of other pictures.

    Args:
        q_RHW: float32, bfloat16 or float16, as k and v; any strides, so views into one tensor [R, 3, H, W] will do.
        layout: where the sequences lie, on the device of q.
        scale: of the scores, before their softmax; W ** -0.5 in most networks.

    Raises:
        ValueError: q, k and v differ in shape, dtype or device, or do not suit the layout; head widths beyond 16 to 128
            or another dtype (for "triton").
    """
    _require(q_RHW, k_RHW, v_RHW, layout)
    if backend == "torch":
        return dense.ragged_attention(q_RHW, k_RHW, v_RHW, layout, scale=scale)
    require_heads(q_RHW)
    attended_RHW: Tensor = _ragged_attention(q_RHW, k_RHW, v_RHW, layout.offsets_M1, layout.sequence_R, scale)
    return attended_RHW


@torch.library.custom_op("tve::ragged_attention", mutates_args=())
def _ragged_attention(
    q_RHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, offsets_M1: Tensor, sequence_R: Tensor, scale: float
) -> Tensor:
    from tve_kernels.ragged_attention import kernel

    return kernel.ragged_attention(q_RHW, k_RHW, v_RHW, offsets_M1, sequence_R, scale)


@_ragged_attention.register_fake
def _(q_RHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, offsets_M1: Tensor, sequence_R: Tensor, scale: float) -> Tensor:
    return torch.empty(q_RHW.shape, dtype=q_RHW.dtype, device=q_RHW.device)


def _require(q_RHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged) -> None:
    if q_RHW.ndim != 3 or len(q_RHW) != layout.num_rows:
        raise ValueError(
            f"q: expected [{layout.num_rows}, H, W], a row for each of the layout's, got {list(q_RHW.shape)}"
        )
    for name, other in (("k", k_RHW), ("v", v_RHW)):
        if other.shape != q_RHW.shape or other.dtype != q_RHW.dtype or other.device != q_RHW.device:
            raise ValueError(
                f"{name}: expected {q_RHW.dtype} {list(q_RHW.shape)} on {q_RHW.device}, as q, got {other.dtype} "
                f"{list(other.shape)} on {other.device}"
            )
    if layout.offsets_M1.device != q_RHW.device or layout.sequence_R.device != q_RHW.device:
        raise ValueError(
            f"layout: expected its tensors on {q_RHW.device}, as q, got them on {layout.offsets_M1.device}; "
            "make it with Ragged.of(lengths, device)"
        )
