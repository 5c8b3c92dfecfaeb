"""Ragged attention in PyTorch's own fast programs: a call for each run of sequences of equal length.

PyTorch's `scaled_dot_product_attention` everywhere but in bfloat16 on a CPU: there it takes twice the time of batched
matrix products and a softmax (measured on 2 cores with AVX-512 and its bfloat16 dot products), because its blocks
suit long sequences, and those of a window hold 20 to 200 rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tve_kernels.layout import Ragged

SCORES_AT_ONCE = 2**20  # as bfloat16 2 MiB, which stay in a core's cache
VECTOR = 16  # float32 numbers of a vector: a softmax over fewer runs number by number
LONGEST_IN_FLOAT32 = 128  # beyond, the softmax's conversion to float32 and back takes longer than it saves


def ragged_attention(q_RHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged, *, scale: float) -> Tensor:
    """Attended values [R, H, W] in the dtype of q, as `reference.ragged_attention`."""
    if q_RHW.device.type == "cpu" and q_RHW.dtype == torch.bfloat16:
        return _by_products(q_RHW, k_RHW, v_RHW, layout, scale)
    rows = []
    for _, _, parts in layout.dense(q_RHW, k_RHW, v_RHW):
        q_MHLW, k_MHLW, v_MHLW = (x_MLHW.transpose(1, 2) for x_MLHW in parts)
        attended_MHLW = scaled_dot_product_attention(q_MHLW, k_MHLW, v_MHLW, scale=scale)
        rows.append(attended_MHLW.transpose(1, 2).flatten(0, 1))
    if not rows:
        return torch.empty(q_RHW.shape, dtype=q_RHW.dtype, device=q_RHW.device)
    return rows[0] if len(rows) == 1 else torch.cat(rows)  # one run of equal lengths needs no copy


def _by_products(q_RHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged, scale: float) -> Tensor:
    num_heads = q_RHW.shape[1]
    out_RHW = torch.empty(q_RHW.shape, dtype=q_RHW.dtype, device=q_RHW.device)
    for run, _, parts in layout.dense(q_RHW, k_RHW, v_RHW, out_RHW):
        at_once = max(1, SCORES_AT_ONCE // (num_heads * run.length**2))
        for first in range(0, run.num_sequences, at_once):
            *qkv, out_mLHW = (part_MLHW[first : first + at_once] for part_MLHW in parts)
            q_nLW, k_nLW, v_nLW = (x_mLHW.transpose(1, 2).contiguous().flatten(0, 1) for x_mLHW in qkv)
            ignored_111 = torch.empty((1, 1, 1), dtype=q_nLW.dtype)  # beta = 0: never read
            scores_nLL = torch.baddbmm(ignored_111, q_nLW, k_nLW.mT, beta=0, alpha=scale)
            attended_nLW = torch.bmm(_softmax(scores_nLL), v_nLW)
            out_mLHW.copy_(attended_nLW.unflatten(0, (-1, num_heads)).transpose(1, 2))
    return out_RHW


def _softmax(scores_nLL: Tensor) -> Tensor:
    length = scores_nLL.shape[-1]
    if length > LONGEST_IN_FLOAT32:
        return torch.softmax(scores_nLL, -1)
    if length < VECTOR:
        scores_nLL = pad(scores_nLL, (0, VECTOR - length), value=-torch.inf)
    return torch.softmax(scores_nLL, -1, dtype=torch.float32).to(scores_nLL.dtype)[..., :length]
