"""Attention of a sequence's Q pooled tokens to all rows of the sequence: the definition.

out[m, i] = sum over s of softmax_s(scale * q[m, i] . k[s]) * v[s],   s over the rows of sequence m
"""

from itertools import pairwise

import torch
from torch import Tensor

from tve_kernels.layout import Ragged


def pooled_attention(q_MQHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged, *, scale: float) -> Tensor:
    """Attended values [M, Q, H, W] in the dtype of q, any floating dtype, one sequence after the other."""
    out_MQHW = torch.empty(q_MQHW.shape, dtype=q_MQHW.dtype, device=q_MQHW.device)
    for sequence, (first, last) in enumerate(pairwise(layout.offsets_M1.tolist())):
        q_HQW = q_MQHW[sequence].transpose(0, 1)
        k_HLW, v_HLW = (rows_RHW[first:last].transpose(0, 1) for rows_RHW in (k_RHW, v_RHW))
        weights_HQL = torch.softmax(scale * q_HQW @ k_HLW.mT, dim=-1)
        out_MQHW[sequence] = (weights_HQL @ v_HLW).transpose(0, 1)
    return out_MQHW
