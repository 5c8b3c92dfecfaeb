"""Attention of one or two pooled tokens of each sequence to all rows of it: what is called."""

import torch
from torch import Tensor

from tve_kernels.backend import Backend
from tve_kernels.layout import Ragged
from tve_kernels.limits import require_heads
from tve_kernels.pooled_attention import dense


def pooled_attention(
    q_MQHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged, *, scale: float, backend: Backend
) -> Tensor:
    """Attended values [M, Q, H, W] in the dtype of q: what a network's last block needs of its attention.

    Inference only: "triton" has no gradient.

    Args:
        q_MQHW: the queries of each sequence's Q pooled tokens, Q = 1 or 2; float32, bfloat16 or float16, as k and v.
        k_RHW: of all rows, as v; any strides, so views into one tensor [R, 2, H, W] will do.
        layout: where the sequences lie, on the device of q.
        scale: of the scores, before their softmax; W ** -0.5 in most networks.

    Raises:
        ValueError: q, k and v differ in heads, dtype or device, or do not suit the layout; Q is neither 1 nor 2; head
            widths beyond 16 to 128 or another dtype (for "triton").
    """
    _require(q_MQHW, k_RHW, v_RHW, layout)
    if backend == "torch":
        return dense.pooled_attention(q_MQHW, k_RHW, v_RHW, layout, scale=scale)
    require_heads(q_MQHW)
    attended_MQHW: Tensor = _pooled_attention(q_MQHW, k_RHW, v_RHW, layout.offsets_M1, scale)
    return attended_MQHW


@torch.library.custom_op("tve::pooled_attention", mutates_args=())
def _pooled_attention(q_MQHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, offsets_M1: Tensor, scale: float) -> Tensor:
    from tve_kernels.pooled_attention import kernel

    return kernel.pooled_attention(q_MQHW, k_RHW, v_RHW, offsets_M1, scale)


@_pooled_attention.register_fake
def _(q_MQHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, offsets_M1: Tensor, scale: float) -> Tensor:
    return torch.empty(q_MQHW.shape, dtype=q_MQHW.dtype, device=q_MQHW.device)


def _require(q_MQHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged) -> None:
    if q_MQHW.ndim != 4 or len(q_MQHW) != layout.num_sequences or q_MQHW.shape[1] not in (1, 2):
        raise ValueError(
            f"q: expected [{layout.num_sequences}, 1 or 2, H, W], pooled tokens of each of the layout's sequences, got "
            f"{list(q_MQHW.shape)}"
        )
    expected = (layout.num_rows, *q_MQHW.shape[2:])
    for name, rows in (("k", k_RHW), ("v", v_RHW)):
        if rows.shape != expected or rows.dtype != q_MQHW.dtype or rows.device != q_MQHW.device:
            raise ValueError(
                f"{name}: expected {q_MQHW.dtype} {list(expected)} on {q_MQHW.device}, to suit q and the layout, got "
                f"{rows.dtype} {list(rows.shape)} on {rows.device}"
            )
    if layout.offsets_M1.device != q_MQHW.device:
        raise ValueError(
            f"layout: expected its tensors on {q_MQHW.device}, as q, got them on {layout.offsets_M1.device}; "
            "make it with Ragged.of(lengths, device)"
        )
