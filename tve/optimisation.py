"""How explainers are optimised: AdamW, a warm-up, a cosine, clipped gradients, and no loss but a finite one.

learning rate at step t of T = peak * min(1, (t + 1) / warm-up) * (1 + cos(pi t / T)) / 2
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_GRADIENT = 1.0  # norm over all parameters; a larger one is scaled down to it


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; names the step and the pictures."""


def adamw(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over groups of {"params", "peak"}: the highest learning rate of each."""
    return torch.optim.AdamW(groups, weight_decay=weight_decay, betas=(0.9, 0.98))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int, warmup_steps: int) -> None:
    """Sets each group's rate for a step, counted from 0, by its peak."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * warmup * cosine


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, where: str, keys: Sequence[str], remedy: str) -> None:
    """One step down the gradient of a loss.

    Args:
        optimizer: whose learning rates are set.
        loss: a scalar.
        where: training and step, for the error.
        keys: of the batch's pictures, for the error.
        remedy: which setting to look at, for the error.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; nothing was changed.
    """
    if not math.isfinite(loss.item()):
        raise NonFiniteLossError(
            f"{where}: expected a finite loss, got {loss.item()} on pictures {', '.join(keys)}; {remedy}, or look at "
            "these pictures"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
    optimizer.step()
