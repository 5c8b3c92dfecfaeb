"""One term of the windowed regression loss, in plain PyTorch.

loss = mean over B, M, D of ((predicted[b, index[b, m]] - target[b, m]) @ norm)^2      (objective.regression_loss)
"""

from torch import Tensor


def window_loss(predicted_BND: Tensor, target_BMD: Tensor, index_BM: Tensor, norm_DD: Tensor) -> Tensor:
    """The loss, a scalar in norm's dtype; gradients of a window that was drawn twice add."""
    drawn_BMD = predicted_BND.gather(1, index_BM[..., None].expand(-1, -1, predicted_BND.shape[-1]))
    error_BMD = drawn_BMD - target_BMD
    return (error_BMD @ norm_DD).square().mean()
