"""Pooled attention in PyTorch's own fast programs: a call for each run of sequences of equal length.

PyTorch's `scaled_dot_product_attention` everywhere but in bfloat16 on a CPU: there batched matrix products and a
softmax are faster (see `ragged_attention.dense`).
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tve_kernels.layout import Ragged


def pooled_attention(q_MQHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged, *, scale: float) -> Tensor:
    """Attended values [M, Q, H, W] in the dtype of q, as `reference.pooled_attention`."""
    attend = _by_products if q_MQHW.device.type == "cpu" and q_MQHW.dtype == torch.bfloat16 else _by_pytorch
    parts = []
    for _, sequences, (k_mLHW, v_mLHW) in layout.dense(k_RHW, v_RHW):
        q_mHQW, k_mHLW, v_mHLW = (x.transpose(1, 2) for x in (q_MQHW[sequences], k_mLHW, v_mLHW))
        parts.append(attend(q_mHQW, k_mHLW, v_mHLW, scale).transpose(1, 2))
    return torch.cat(parts) if parts else torch.empty_like(q_MQHW)


def _by_pytorch(q_mHQW: Tensor, k_mHLW: Tensor, v_mHLW: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(q_mHQW, k_mHLW, v_mHLW, scale=scale)


def _by_products(q_mHQW: Tensor, k_mHLW: Tensor, v_mHLW: Tensor, scale: float) -> Tensor:
    q_nQW, k_nLW, v_nLW = (x.contiguous().flatten(0, 1) for x in (q_mHQW, k_mHLW, v_mHLW))
    ignored_111 = torch.empty((1, 1, 1), dtype=q_nQW.dtype)  # beta = 0: never read
    scores_nQL = torch.baddbmm(ignored_111, q_nQW, k_nLW.mT, beta=0, alpha=scale)
    weights_nQL = torch.softmax(scores_nQL, -1, dtype=torch.float32).to(q_nQW.dtype)
    attended_nQW = torch.bmm(weights_nQL, v_nLW)
    return attended_nQW.view(q_mHQW.shape)
