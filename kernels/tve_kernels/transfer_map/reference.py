"""The transfer rule for a linear head, in plain PyTorch: it makes the readings of all classes, then takes some.

u[p, q]   = w+ (l(g[p, q]) - l(G(∅)))  +  w- (l(G(x)) - l(h[p, q]))
phi[p, q] = mean of u over the windows that contain patch (p, q)         (TVE, arXiv 2312.15359, section 4)
"""

from typing import Literal

import torch
from torch import Tensor, nn

Output = Literal["logit", "probability", "log_probability"]


def transfer_map(
    kept_BND: Tensor,
    removed_BND: Tensor,
    full_BD: Tensor,
    empty_D: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor | None,
    target_BK: Tensor,
    *,
    patches_per_side: int,
    radius: int,
    output: Output,
    weight_kept: float,
    weight_removed: float,
    window_mean: bool,
) -> Tensor:
    """Maps [B, K, P, P] of classes target_BK (int64), float32 (float64 of float64): phi, or u without window_mean."""
    exact = torch.promote_types(weight_CD.dtype, torch.float32)
    weight_CD, bias_C = weight_CD.to(exact), None if bias_C is None else bias_C.to(exact)

    def read(embeddings: Tensor) -> Tensor:
        logits = nn.functional.linear(embeddings.to(exact), weight_CD, bias_C)
        if output == "logit":
            return logits
        return logits.softmax(-1) if output == "probability" else logits.log_softmax(-1)

    kept_BNC = weight_kept * (read(kept_BND) - read(empty_D))
    removed_BNC = weight_removed * (read(full_BD)[:, None] - read(removed_BND))
    u_BCN = (kept_BNC + removed_BNC).transpose(1, 2)
    u_BKN = u_BCN.gather(1, target_BK[..., None].expand(-1, -1, u_BCN.shape[-1]))
    return maps(u_BKN, patches_per_side, radius, window_mean)


def maps(u_BKN: Tensor, patches_per_side: int, radius: int, window_mean: bool) -> Tensor:
    """u as maps [B, K, P, P], or its mean over N_r(p, q), clipped at the border."""
    maps_BKPP: Tensor = u_BKN.unflatten(2, (patches_per_side, patches_per_side))
    if not window_mean:
        return maps_BKPP
    one_channel = maps_BKPP.reshape(-1, 1, patches_per_side, patches_per_side)  # pooling refuses zero channels
    pooled = nn.functional.avg_pool2d(one_channel, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    return pooled.view_as(maps_BKPP)
