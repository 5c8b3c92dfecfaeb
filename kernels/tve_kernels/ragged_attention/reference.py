"""Softmax attention of every row within its own sequence: the definition.

out[r] = sum over s of softmax_s(scale * q[r] . k[s]) * v[s],   s over the rows of the sequence of r
"""

from itertools import pairwise

import torch
from torch import Tensor

from tve_kernels.layout import Ragged


def ragged_attention(q_RHW: Tensor, k_RHW: Tensor, v_RHW: Tensor, layout: Ragged, *, scale: float) -> Tensor:
    """Attended values [R, H, W] in the dtype of q, any floating dtype, one sequence after the other."""
    out_RHW = torch.empty(q_RHW.shape, dtype=q_RHW.dtype, device=q_RHW.device)
    for first, last in pairwise(layout.offsets_M1.tolist()):
        q_HLW, k_HLW, v_HLW = (rows_RHW[first:last].transpose(0, 1) for rows_RHW in (q_RHW, k_RHW, v_RHW))
        weights_HLL = torch.softmax(scale * q_HLW @ k_HLW.mT, dim=-1)
        out_RHW[first:last] = (weights_HLL @ v_HLW).transpose(0, 1)
    return out_RHW
