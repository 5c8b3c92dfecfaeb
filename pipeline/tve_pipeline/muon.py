"""Muon in float32: torch.optim.Muon orthogonalises in bfloat16, whatever the device has products of.

On a CPU with AVX2 alone, whose products of bfloat16 are emulated, that is .94 of the 1.15 s that a step of the scenes'
ViT takes, and .02 s in float32 (docs/experiments.md).
"""

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's quintic, as torch.optim.Muon has them
NUM_ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov's), orthogonalised, with decoupled weight decay, scaled to the size of AdamW's updates.

        W <- (1 - lr * decay) W - lr * .2 sqrt(max(rows, columns)) * NS5(g + momentum * (m - g)),   m an average of g

    Jordan et al., https://kellerjordan.github.io/posts/muon; the scale is that of arXiv 2502.16982. But for rounding it
    is torch.optim.Muon with adjust_lr_fn="match_rms_adamw". Matrices of one shape are orthogonalised together.

    Args:
        matrices: parameters of two dimensions.
        lr: learning rate, as of AdamW.
        weight_decay: as of AdamW.

    Raises:
        ValueError: a parameter of another number of dimensions.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        for parameter in (each for group in self.param_groups for each in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"matrices: expected parameters of two dimensions, got {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        if closure is not None:
            raise ValueError("closure: expected None, got one; compute the gradients before the step")
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in of_shape.items():
                updates = torch.stack([self._momentum(each) for each in parameters])
                orthogonal = zeropower_via_newtonschulz(updates, NUM_ITERATIONS, [COEFFICIENTS], dtype=torch.float32)
                scaled_lr = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scaled_lr)

    def _momentum(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "average" not in state:
            state["average"] = torch.zeros_like(gradient)
        average: Tensor = state["average"]
        average.lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(average, MOMENTUM)
