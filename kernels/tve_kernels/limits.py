"""What shapes the kernels serve, for ops to refuse others and for callers to choose by."""

import torch
from torch import Tensor

NARROWEST_HEAD, WIDEST_HEAD = 16, 128
WIDEST_ROW = 4096  # of a norm: a row lies in the registers of one program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_heads(queries: Tensor) -> None:
    """Raises ValueError unless the attention kernels serve queries [..., W] of this dtype and width."""
    if queries.dtype not in DTYPES:
        raise ValueError(f"q: expected float32, bfloat16 or float16, got {queries.dtype}; use the backend 'torch'")
    if not NARROWEST_HEAD <= queries.shape[-1] <= WIDEST_HEAD:
        raise ValueError(
            f"q: expected heads of width {NARROWEST_HEAD} to {WIDEST_HEAD}, got {queries.shape[-1]}; use the backend "
            "'torch'"
        )
