"""Triton starts a program on the current device, whatever device its tensors are on."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of_first(launcher: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The launcher with the device of its first argument as the current one; a CPU tensor changes nothing."""

    @wraps(launcher)
    def launched(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return launcher(first, *args, **kwargs)

    return launched
